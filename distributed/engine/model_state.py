"""What engines share: precision, the update, tensors under canonical names, however they lie on the ranks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from distributed.config.sections import AdamW, Sgd
from distributed.engine.sharding import LocalTensor, Replicated, load
from distributed.optim import loss_scale
from distributed.optim.loss_scale import LossScale
from distributed.optim.optimizer import Optimizer, WeightEMA


def cast(model: nn.Module, *, precision: str, channels_last: bool, device: torch.device) -> nn.Module:
    """The model on its device, in the type and memory layout of its weights."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return model.to(device, dtype).to(memory_format=memory_format)


def low_type(precision: str) -> torch.dtype | None:
    """What autocast casts to; None where nothing is cast."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The precision of a forward pass."""
    low = low_type(precision)
    return torch.autocast(device.type, low) if low else nullcontext()


class Layout(Protocol):
    """How tensors of a model lie on the ranks."""

    def held(self, name: str, tensor: Tensor) -> LocalTensor:
        """This rank's part of the parameter or buffer of this name: the same memory, a plain tensor."""
        ...

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        """This rank's part of the parameter's gradient, a plain tensor."""
        ...

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all parts on all ranks, a scalar; a collective."""
        ...


class ReplicatedLayout:
    """Every rank has everything."""

    def held(self, name: str, tensor: Tensor) -> LocalTensor:
        return LocalTensor(tensor, Replicated(tensor.shape))

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)


class ModelState:
    """A model's weights with all that learning keeps of them: the optimizer's tensors, the moving average, and in float16
    the scale of the loss."""

    def __init__(
        self, config: Sgd | AdamW, model: nn.Module, *, precision: str = "float32", layout: Layout | None = None
    ) -> None:
        self.model, self.max_grad_norm, self.layout = model, config.max_grad_norm, layout or ReplicatedLayout()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._own = {name: self.layout.held(name, tensor) for name, tensor in model.state_dict().items()}
        # The parameters themselves where they are whole: gradients come into `.grad` of those.
        parts = {name: self.layout.held(name, p).part for name, p in self._parameters.items()}
        self.optimizer = Optimizer(config, list(parts.values()), dims=[p.dim() for p in self._parameters.values()])
        self._kept = {name: self.optimizer.state.get(part, {}) for name, part in parts.items()}
        live = {name: held.part for name, held in self._own.items()}
        self.average = WeightEMA(live, decay=config.ema_decay) if config.ema_decay else None
        self._scale = LossScale(next(model.parameters()).device) if precision == "float16" else None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as it goes into the backward pass."""
        return loss if self._scale is None else loss * self._scale.scale

    def update(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        """Scale the gradients down to the norm where they are larger, and take a step; their norm before that.

        In float16 a step whose gradients are not all finite changes nothing, and the norm is infinite.
        """
        parameters = self.optimizer.parameters
        gradients = [self.layout.gradient(name, p) for name, p in self._parameters.items()]
        norm = self.layout.norm(gradients)
        factor = overflow = None
        if self._scale:
            # All ranks have this norm alike, and it is finite just where all gradients are.
            norm = norm / self._scale.scale
            overflow = (~norm.isfinite()).float()
            norm = torch.where(overflow != 0, torch.inf, norm)
            factor = 1 / self._scale.scale
            self._scale.update(overflow)
        if self.max_grad_norm is not None:
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            # Not in place, nor by the optimizer, which would be: these may lie in memory that all ranks share.
            gradients = list(torch._foreach_mul(gradients, factor))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step(lr, skip=overflow)
        if self.average:
            self.average.update(step, skip=overflow)
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
        parameter, `ema.NAME` for averages, `scaler.scale` and its count; each whole, one at a time. All ranks go through
        it alike."""
        for name, (part, place) in self.held().items():
            yield name, place.whole(part)
        yield from self._scale.state() if self._scale else ()

    def held(self) -> dict[str, LocalTensor]:
        """This rank's parts of all that, by canonical name."""
        found = {f"model.{name}": held for name, held in self._own.items()}
        for name, kept in self._kept.items():
            for key, part in kept.items():
                place = self._own[name].place if part.dim() else Replicated(part.shape)
                found[f"optimizer.{name}.{key}"] = LocalTensor(part, place)
        for name, part in self.average.tensors.items() if self.average else ():
            found[f"ema.{name}"] = LocalTensor(part, self._own[name].place)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; see `placement.load`. The scale, where it is not given, is its first."""
        load(self.held(), tensors, apart=loss_scale.PREFIX if self._scale else "")
        if self._scale:
            self._scale.load(tensors)
