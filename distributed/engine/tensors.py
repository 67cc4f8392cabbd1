"""A model's and an optimizer's tensors under canonical names, which do not depend on the engine."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """`model.NAME` for parameters and persistent buffers, `optimizer.NAME.KEY` for what the optimizer keeps of a parameter."""
    for name, tensor in model.state_dict().items():
        yield f"model.{name}", tensor
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer.{name}.{key}", value


@torch.no_grad()
def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors in; those of the optimizer appear where it has none yet.

    Raises:
        ValueError: a tensor of the model is missing, has another shape, or one is left over.
    """
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name}: here {tuple(tensor.shape)}, there {tuple(tensors[name].shape) if name in tensors else 'nothing'}"
        for name, tensor in own.items()
        if name not in tensors or tensors[name].shape != tensor.shape
    ]
    parameters = dict(model.named_parameters())
    of_optimizer = [name for name in tensors if name.startswith("optimizer.")]
    wrong += [f"{name}: not known here" for name in tensors if name not in own and name not in of_optimizer]
    wrong += [f"{name}: no such parameter" for name in of_optimizer if name[10:].rpartition(".")[0] not in parameters]
    if wrong:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(wrong))
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    optimizer.state.clear()
    for name in of_optimizer:
        parameter_name, _, key = name[10:].rpartition(".")
        parameter = parameters[parameter_name]
        value = torch.empty_like(parameter).copy_(tensors[name])
        optimizer.state[parameter][key] = value
