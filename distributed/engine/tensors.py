"""What engines share: precision, the update, tensors under canonical names, however they lie on the ranks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from distributed.config.sections import AdamW, Sgd
from distributed.engine.placement import Held, Whole, load
from distributed.optim import Optimizer, WeightAverage


def cast(model: nn.Module, *, precision: str, channels_last: bool, device: torch.device) -> nn.Module:
    """The model on its device, in the type and memory layout of its weights."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return model.to(device, dtype).to(memory_format=memory_format)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


class Layout(Protocol):
    """How tensors of a model lie on the ranks."""

    def held(self, tensor: Tensor) -> Held:
        """This rank's part of a parameter or buffer: the same memory, a plain tensor."""
        ...

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all parts on all ranks, a scalar; a collective."""
        ...


class Replicated:
    """Every rank has everything."""

    def held(self, tensor: Tensor) -> Held:
        return Held(tensor, Whole(tensor.shape))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)


class Weights:
    """A model's weights with all that learning keeps of them: the optimizer's tensors and the moving average."""

    def __init__(self, config: Sgd | AdamW, model: nn.Module, *, layout: Layout | None = None) -> None:
        self.model, self.clip_norm, self.layout = model, config.clip_norm, layout or Replicated()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._own = {name: self.layout.held(tensor) for name, tensor in model.state_dict().items()}
        # The parameters themselves where they are whole: gradients come into `.grad` of those.
        parts = {name: self.layout.held(p).part for name, p in self._parameters.items()}
        self.optimizer = Optimizer(config, list(parts.values()))
        self._kept = {name: self.optimizer.state.get(part, {}) for name, part in parts.items()}
        live = {name: held.part for name, held in self._own.items()}
        self.average = WeightAverage(live, decay=config.ema_decay) if config.ema_decay else None

    def update(self, lr: float, *, step: int) -> Tensor:
        """Scale the gradients down to the norm where they are larger, and take a step; their norm before that."""
        parameters = self.optimizer.parameters
        gradients = [self.layout.held(p.grad).part for p in self._parameters.values() if p.grad is not None]
        norm = self.layout.norm(gradients)
        if self.clip_norm is not None:
            # Not in place: these may lie in memory that all ranks share.
            gradients = list(torch._foreach_mul(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step(lr)
        if self.average:
            self.average.update(step)
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()
        for parameter in self._parameters.values():  # others than the optimizer's where those are parts
            parameter.grad = None

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model in evaluation, with the averaged weights if there are any; in training again after that."""
        self.model.eval()
        with self.average.in_place() if self.average else nullcontext():
            yield
        self.model.train()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """`model.NAME` for parameters and persistent buffers, `optimizer.NAME.KEY` for what the optimizer keeps of a
        parameter, `ema.NAME` for averages; each whole, one at a time. All ranks go through it alike."""
        for name, (part, place) in self.held().items():
            yield name, place.whole(part)

    def held(self) -> dict[str, Held]:
        """This rank's parts of all that, by canonical name."""
        found = {f"model.{name}": held for name, held in self._own.items()}
        for name, kept in self._kept.items():
            for key, part in kept.items():
                place = self._own[name].place if part.dim() else Whole(part.shape)
                found[f"optimizer.{name}.{key}"] = Held(part, place)
        for name, part in self.average.tensors.items() if self.average else ():
            found[f"ema.{name}"] = Held(part, self._own[name].place)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; see `placement.load`."""
        load(self.held(), tensors)
