"""What engines with whole weights on each rank share: precision, the update, tensors under canonical names."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from distributed.optim import Optimizer


def cast(model: nn.Module, *, precision: str, channels_last: bool, device: torch.device) -> nn.Module:
    """The model on its device, in the type and memory layout of its weights."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return model.to(device, dtype).to(memory_format=memory_format)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def update(optimizer: Optimizer, *, lr: float, clip_norm: float | None) -> Tensor:
    """Scale the gradients down to the norm where they are larger, and take a step; their norm before that."""
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        # Not in place: these may lie in memory that all ranks share.
        scaled = torch._foreach_mul(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for parameter, gradient in zip(optimizer.parameters, scaled, strict=True):
            parameter.grad = gradient
    optimizer.step(lr)
    return norm


def named_state(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """`model.NAME` for parameters and persistent buffers, `optimizer.NAME.KEY` for what the optimizer keeps of a parameter."""
    for name, tensor in model.state_dict().items():
        yield f"model.{name}", tensor
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{name}.{key}", value


@torch.no_grad()
def load_named_state(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors in; what the optimizer keeps and is not given becomes zero, as at the start.

    Raises:
        ValueError: a tensor of the model is missing, has another shape, or one is left over.
    """
    own = dict(named_state(model, optimizer))
    wrong = [
        f"{name}: here {tuple(tensor.shape)}, there {tuple(tensors[name].shape) if name in tensors else 'nothing'}"
        for name, tensor in own.items()
        if (name not in tensors and name.startswith("model."))
        or (name in tensors and tensors[name].shape != tensor.shape)
    ]
    wrong += [f"{name}: not known here" for name in tensors if name not in own]
    if wrong:
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(wrong))
    for name, tensor in own.items():
        if name in tensors:
            tensor.copy_(tensors[name])
        else:
            tensor.zero_()
