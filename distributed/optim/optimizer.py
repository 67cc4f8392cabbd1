"""SGD and AdamW with weight-decay groups.

Built on torch's functional optimizers: constructing a torch.optim class imports torch's compiler, which takes over a second.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distributed.config.optim import AdamW, Sgd


class Optimizer:
    """SGD or AdamW over two groups: matrices and filters decay; biases and norm weights decay only if the config says so.

    `state` maps each parameter to its optimizer tensors, under torch's names.

    Args:
        parameters: plain tensors with their gradients in `.grad`; for sharded weights, this rank's local tensors.
        dims: number of dimensions of each full parameter, if it differs from that of the local tensor.
    """

    def __init__(self, config: Sgd | AdamW, parameters: Sequence[Tensor], *, dims: Sequence[int] | None = None) -> None:
        self.config, self.parameters = config, list(parameters)
        self._groups = decay_groups(config, self.parameters, dims or [p.dim() for p in self.parameters])
        self.state = {p: state for p in self.parameters if (state := initial_state(config, p))}

    @torch.no_grad()
    def step(self, lr: float | Tensor, *, skip: Tensor | None = None) -> None:
        """Apply one update with the parameters' gradients; a no-op where `skip` is 1.0. Does not synchronize with the device.

        Args:
            skip: a scalar on the device, 0.0 or 1.0.
        """
        for parameters, weight_decay in self._groups:
            if parameters:
                self._update(parameters, skip, lr, weight_decay)

    def _update(self, parameters: list[Tensor], skip: Tensor | None, lr: float | Tensor, weight_decay: float) -> None:
        gradients: Any = [p.grad for p in parameters]
        state, config = self._state_lists(parameters), self.config
        options: dict[str, Any] = {
            "lr": lr, "weight_decay": weight_decay, "maximize": False, "fused": True, "found_inf": skip,
        }  # fmt: skip
        if isinstance(config, AdamW):
            adamw(
                parameters, gradients, state["exp_avg"], state["exp_avg_sq"], [], state["step"], beta1=config.beta1,
                beta2=config.beta2, eps=config.eps, amsgrad=False, **options,
            )  # fmt: skip
        else:
            buffers: Any = state.get("momentum_buffer", [None] * len(parameters))
            sgd(
                parameters, gradients, buffers, momentum=config.momentum, nesterov=config.nesterov, dampening=0.0,
                **options,
            )  # fmt: skip

    def _state_lists(self, parameters: list[Tensor]) -> dict[str, list[Tensor]]:
        """Return the optimizer tensors of these parameters, one list per name."""
        states = [self.state[p] for p in parameters if p in self.state]
        return {name: [state[name] for state in states] for name in (states[0] if states else ())}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class DecayGroup(NamedTuple):
    """Parameters with the same weight decay."""

    parameters: list[Tensor]
    weight_decay: float


def decay_groups(config: Sgd | AdamW, parameters: Iterable[Tensor], dims: Iterable[int]) -> list[DecayGroup]:
    """Split parameters into those with and those without weight decay; either group may be empty."""
    decaying, others = list[Tensor](), list[Tensor]()
    for parameter, dimensions in zip(parameters, dims, strict=True):
        (decaying if dimensions > 1 or config.decay_norm_and_bias else others).append(parameter)
    return [DecayGroup(decaying, config.weight_decay), DecayGroup(others, 0.0)]


def initial_state(config: Sgd | AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Return the optimizer tensors of a parameter before the first step, under torch's names."""
    if isinstance(config, AdamW):
        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": count, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    # From a buffer of zeros, the first step leaves the gradient in it, as torch.optim.SGD does.
    return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum else {}
