"""What engines with whole weights on each rank share: precision, the update, tensors under canonical names."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from distributed.config.sections import AdamW, Sgd
from distributed.optim import Optimizer, WeightAverage


def cast(model: nn.Module, *, precision: str, channels_last: bool, device: torch.device) -> nn.Module:
    """The model on its device, in the type and memory layout of its weights."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return model.to(device, dtype).to(memory_format=memory_format)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


class Weights:
    """Whole weights on each rank with all that learning keeps of them: the optimizer's tensors and the moving average."""

    def __init__(self, config: Sgd | AdamW, model: nn.Module) -> None:
        self.model, self.clip_norm = model, config.clip_norm
        self.optimizer = Optimizer(config, model)
        self.average = WeightAverage(model, decay=config.ema_decay) if config.ema_decay else None

    def update(self, lr: float, *, step: int) -> Tensor:
        """Scale the gradients down to the norm where they are larger, and take a step; their norm before that."""
        parameters = self.optimizer.parameters
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            # Not in place: these may lie in memory that all ranks share.
            scaled = torch._foreach_mul(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            for parameter, gradient in zip(parameters, scaled, strict=True):
                parameter.grad = gradient
        self.optimizer.step(lr)
        if self.average:
            self.average.update(step)
        return norm

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model in evaluation, with the averaged weights if there are any; in training again after that."""
        self.model.eval()
        with self.average.in_place() if self.average else nullcontext():
            yield
        self.model.train()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """`model.NAME` for parameters and persistent buffers, `optimizer.NAME.KEY` for what the optimizer keeps of a
        parameter, `ema.NAME` for averages."""
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{name}.{key}", value
        for name, tensor in self.average.tensors.items() if self.average else ():
            yield f"ema.{name}", tensor

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors in. What the optimizer keeps and is not given becomes zero and averages become the weights, as
        at the start.

        Raises:
            ValueError: a tensor of the model is missing, has another shape, or one is left over.
        """
        own = dict(self.state())
        wrong = [
            f"{name}: here {tuple(tensor.shape)}, there {tuple(tensors[name].shape) if name in tensors else 'nothing'}"
            for name, tensor in own.items()
            if (name not in tensors and name.startswith("model."))
            or (name in tensors and tensors[name].shape != tensor.shape)
        ]
        wrong += [f"{name}: not known here" for name in tensors if name not in own]
        if wrong:
            more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
            raise ValueError("the checkpoint does not fit the model: " + "; ".join(wrong[:3]) + more)
        for name, tensor in own.items():
            kind, _, rest = name.partition(".")
            if name in tensors:
                tensor.copy_(tensors[name])
            elif kind == "ema":
                tensor.copy_(tensors[f"model.{rest}"])
            else:
                tensor.zero_()
