"""Optimizers, weight-decay groups, and the moving average of the weights.

torch's functional forms: constructing a torch.optim class imports torch's compiler, which takes over a second.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distributed.config.sections import AdamW, Sgd


class Optimizer:
    """SGD or AdamW over two groups: matrices and filters decay, biases and batch norm's weights only if the config says so.

    `state` has each parameter's tensors by torch's names for them.

    Args:
        parameters: plain tensors with their gradients in `.grad`; where weights are sharded, the parts of this rank.
        dims: how many dimensions the whole parameters have, where the parts do not have the same.
    """

    def __init__(self, config: Sgd | AdamW, parameters: Sequence[Tensor], *, dims: Sequence[int] | None = None) -> None:
        self.config, self.parameters = config, list(parameters)
        self._groups = decay_groups(config, self.parameters, dims or [p.dim() for p in self.parameters])
        self.state = {p: state for p in self.parameters if (state := first_state(config, p))}

    @torch.no_grad()
    def step(self, lr: float | Tensor, *, skip: Tensor | None = None) -> None:
        """One update with the parameters' gradients; where `skip` is 1.0 and not 0.0, nothing changes. Nobody waits for it."""
        for parameters, weight_decay in self._groups:
            if parameters:
                self._update(parameters, skip, lr, weight_decay)

    def _update(self, parameters: list[Tensor], skip: Tensor | None, lr: float | Tensor, weight_decay: float) -> None:
        gradients: Any = [p.grad for p in parameters]
        kept, config = self._kept(parameters), self.config
        options: dict[str, Any] = {
            "lr": lr, "weight_decay": weight_decay, "maximize": False, "fused": True, "found_inf": skip,
        }  # fmt: skip
        if isinstance(config, AdamW):
            adamw(
                parameters, gradients, kept["exp_avg"], kept["exp_avg_sq"], [], kept["step"], beta1=config.beta1,
                beta2=config.beta2, eps=config.eps, amsgrad=False, **options,
            )  # fmt: skip
        else:
            buffers: Any = kept.get("momentum_buffer", [None] * len(parameters))
            sgd(
                parameters, gradients, buffers, momentum=config.momentum, nesterov=config.nesterov, dampening=0.0,
                **options,
            )  # fmt: skip

    def _kept(self, parameters: list[Tensor]) -> dict[str, list[Tensor]]:
        """What is kept of these parameters, a list a name."""
        states = [self.state[p] for p in parameters if p in self.state]
        return {name: [state[name] for state in states] for name in (states[0] if states else ())}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def decay_groups(
    config: Sgd | AdamW, parameters: Iterable[Tensor], dims: Iterable[int]
) -> list[tuple[list[Tensor], float]]:
    """Those that decay and those that do not, each with its weight decay."""
    decaying, others = list[Tensor](), list[Tensor]()
    for parameter, dimensions in zip(parameters, dims, strict=True):
        (decaying if dimensions > 1 or config.decay_norm_and_bias else others).append(parameter)
    return [(decaying, config.weight_decay), (others, 0.0)]


def first_state(config: Sgd | AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter before the first step, by torch's names."""
    if isinstance(config, AdamW):
        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": count, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    # With nothing in it, the first step leaves the gradient there, as torch's does.
    return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum else {}


class WeightEMA:
    """Exponential moving average of a model's weights and of its batch norm's statistics.

    Args:
        live: the weights and statistics by name, or this rank's parts of them.
        decay: what is kept of the average at a step; less over the first steps, (1 + step) / (10 + step), so that the
            initial weights are soon forgotten.
    """

    def __init__(self, live: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self._live = {name: tensor for name, tensor in live.items() if tensor.is_floating_point()}
        self.tensors = {name: tensor.clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int | Tensor, *, skip: Tensor | None = None) -> None:
        """Take in the weights after this step, counted from 0; a no-op where `skip` is 1.0."""
        averages, live = list(self.tensors.values()), list(self._live.values())
        if isinstance(step, Tensor):
            kept = ((1 + step) / (10 + step)).clamp(max=self.decay)
            taken = (1 - kept) if skip is None else (1 - kept) * (1 - skip)
            steps = torch._foreach_sub(live, averages)
            torch._foreach_mul_(steps, taken.to(steps[0].dtype))
            torch._foreach_add_(averages, steps)
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        if skip is None:
            torch._foreach_lerp_(averages, live, 1 - decay)
        else:
            torch._foreach_lerp_(averages, live, [(1 - decay) * (1 - skip)] * len(live))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For as long as this lasts the model computes with the averages."""
        live, averages = list(self._live.values()), list(self.tensors.values())
        with torch.no_grad():
            kept = [tensor.clone() for tensor in live]
            torch._foreach_copy_(live, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, kept)
