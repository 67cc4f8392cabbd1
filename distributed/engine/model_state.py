"""The state that all engines share: weights, optimizer tensors, EMA and loss scale, however they are sharded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from distributed.config.optim import AnyOptim
from distributed.engine.sharding import LocalTensor, Replicated, load
from distributed.optim import loss_scale
from distributed.optim.ema import WeightEMA
from distributed.optim.loss_scale import LossScale
from distributed.optim.optimizer import Optimizer


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into its own mode on exit. Context manager.

    A network's own `train` may freeze layers by `type(layer) is nn.BatchNorm2d`, which no synchronized layer satisfies.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, training in modes.items():
            module.training = training


class Layout(Protocol):
    """How the tensors of a model are distributed over the ranks."""

    def local_tensor(self, name: str, tensor: Tensor) -> LocalTensor:
        """Return this rank's part of the parameter or buffer `name`: a plain tensor that shares its memory."""
        ...

    def local_gradient(self, name: str, parameter: Tensor) -> Tensor:
        """Return this rank's part of the parameter's gradient, a plain tensor."""
        ...

    def global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over the local gradients of all ranks, a scalar on the device; a collective."""
        ...


class ReplicatedLayout:
    """Every rank has all tensors: a `Layout`."""

    def local_tensor(self, name: str, tensor: Tensor) -> LocalTensor:
        return LocalTensor(tensor, Replicated(tensor.shape))

    def local_gradient(self, name: str, parameter: Tensor) -> Tensor:
        # The loss does not depend on a parameter without a gradient.
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)


class ModelState:
    """A model's weights and everything that training keeps for them: optimizer tensors, EMA and, in float16, the loss scale."""

    def __init__(
        self, config: AnyOptim, model: nn.Module, *, precision: str = "float32", layout: Layout | None = None
    ) -> None:
        self.model, self.max_grad_norm, self.layout = model, config.max_grad_norm, layout or ReplicatedLayout()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._model_tensors = {name: self.layout.local_tensor(name, t) for name, t in model.state_dict().items()}
        # By parameter, not by state_dict entry: replicated weights have their gradients in `.grad` of the parameters.
        local = {name: self.layout.local_tensor(name, p).local for name, p in self._parameters.items()}
        dims, low = [p.dim() for p in self._parameters.values()], torch.bfloat16 if precision == "bfloat16" else None
        self.optimizer = Optimizer(config, list(local.values()), dims=dims, muon_dtype=low)
        self._optimizer_tensors = {name: self.optimizer.state.get(tensor, {}) for name, tensor in local.items()}
        live = {name: tensor.local for name, tensor in self._model_tensors.items()}
        self.ema = WeightEMA(live, decay=config.ema_decay, trained=self._parameters) if config.ema_decay else None
        self._loss_scale = LossScale(next(model.parameters()).device) if precision == "float16" else None

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss to backpropagate: in float16 multiplied by the loss scale."""
        return loss if self._loss_scale is None else loss * self._loss_scale.scale

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        """Clip the gradients to `max_grad_norm` and update the weights. Return the gradient norm before clipping.

        In float16 gradients are divided by the loss scale first. If one of them is not finite, only the loss scale changes, and
        the norm is infinite.
        """
        gradients = [self.layout.local_gradient(name, p) for name, p in self._parameters.items()]
        norm, factors = self.layout.global_norm(gradients), list[Tensor]()
        overflow: Tensor | None = None
        if self._loss_scale:
            norm, unscale, overflow = _unscaled(norm, self._loss_scale)
            factors.append(unscale)
        if self.max_grad_norm is not None:
            factors.append((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        if factors:
            # Not in place, nor by the optimizer, which would work in place: gradients may be in memory shared by all ranks.
            gradients = list(
                torch._foreach_mul(gradients, factors[0] if len(factors) == 1 else factors[0] * factors[1])
            )
        for parameter, gradient in zip(self.optimizer.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step(lr, skip=overflow)
        if self.ema:
            self.ema.update(step, skip=overflow)
        return norm

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()
        for parameter in self._parameters.values():  # not the optimizer's parameters if weights are sharded
            parameter.grad = None

    def averaged(self) -> AbstractContextManager[None]:
        """Put the EMA weights into the model if there are any; restore its own on exit. Context manager."""
        return self.ema.in_place() if self.ema else nullcontext()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode, with the EMA weights if there are any; undo both on exit. Context manager."""
        # The averages first: the `eval` of some networks merges weights.
        with self.averaged(), evaluation_mode(self.model):
            yield

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full tensor needed to resume, one at a time; a collective.

        Names are `model.NAME` for parameters and persistent buffers, `optimizer.NAME.KEY` for the optimizer's tensors,
        `ema.NAME` for averages, `scaler.scale` and `scaler.good_steps` for the loss scale.
        """
        for name, (local, placement) in self.local_tensors().items():
            yield name, placement.gather(local)
        yield from self._loss_scale.state() if self._loss_scale else ()

    def local_tensors(self) -> dict[str, LocalTensor]:
        """Return this rank's parts of the tensors that `state` yields, without the loss scale, by the same names."""
        tensors = {f"model.{name}": tensor for name, tensor in self._model_tensors.items()}
        for name, by_key in self._optimizer_tensors.items():
            for key, local in by_key.items():
                placement = self._model_tensors[name].placement if local.dim() else Replicated(local.shape)
                tensors[f"optimizer.{name}.{key}"] = LocalTensor(local, placement)
        for name, local in self.ema.tensors.items() if self.ema else ():
            tensors[f"ema.{name}"] = LocalTensor(local, self._model_tensors[name].placement)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` yielded; see `sharding.load`. A missing loss scale becomes the initial one."""
        load(self.local_tensors(), tensors, loaded_by_caller=loss_scale.PREFIX if self._loss_scale else "")
        if self._loss_scale:
            self._loss_scale.load(tensors)


def _unscaled(norm: Tensor, loss_scale: LossScale) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unscaled gradient norm, the factor that unscales gradients, and 1.0 if one overflowed, else 0.0.

    All ranks have the same norm, and it is finite exactly if all gradients are. Adjusts the scale for the next step.
    """
    norm = norm / loss_scale.scale
    overflow = (~norm.isfinite()).float()
    unscale = 1 / loss_scale.scale
    loss_scale.update(overflow)
    return torch.where(overflow != 0, torch.inf, norm), unscale, overflow
