"""SGD, AdamW and Muon over groups of parameters.

Built on torch's functional optimizers: constructing a torch.optim class imports torch's compiler, which takes over a second.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distributed.config.optim import AnyOptim, Muon, Sgd
from distributed.optim.muon import muon


class Optimizer:
    """The config's optimizer.

    `state` maps each parameter to its optimizer tensors, under torch's names.

    Args:
        parameters: plain tensors with their gradients in `.grad`; for sharded weights, this rank's local tensors.
        dims: number of dimensions of each full parameter, if it differs from that of the local tensor.
        muon_dtype: dtype of Muon's matrix products; by default that of the parameters.
    """

    def __init__(
        self,
        config: AnyOptim,
        parameters: Sequence[Tensor],
        *,
        dims: Sequence[int] | None = None,
        muon_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.parameters, self._muon_dtype = config, list(parameters), muon_dtype
        self._groups = parameter_groups(config, self.parameters, dims or [p.dim() for p in self.parameters])
        self.state = {
            p: state
            for group in self._groups
            for p in group.parameters
            if (state := initial_state(config, p, group.rule))
        }

    @torch.no_grad()
    def step(self, lr: float | Tensor, *, skip: Tensor | None = None) -> None:
        """Apply one update with the parameters' gradients; a no-op where `skip` is 1.0. Does not synchronize with the device.

        Args:
            skip: a scalar on the device, 0.0 or 1.0.
        """
        for group in self._groups:
            if group.parameters:
                self._update(group, lr * group.lr_factor, skip)

    def _update(self, group: "ParameterGroup", lr: float | Tensor, skip: Tensor | None) -> None:
        parameters, config = group.parameters, self.config
        gradients: Any = [p.grad for p in parameters]
        state = self._state_lists(parameters)
        options: dict[str, Any] = {"lr": lr, "weight_decay": group.weight_decay}
        fused: dict[str, Any] = {"maximize": False, "fused": True, "found_inf": skip}
        if group.rule == "muon":
            assert isinstance(config, Muon)
            muon(
                parameters, gradients, state["momentum_buffer"], momentum=config.momentum, dtype=self._muon_dtype, skip=skip,
                **options,
            )  # fmt: skip
        elif isinstance(config, Sgd):
            buffers: Any = state.get("momentum_buffer", [None] * len(parameters))
            sgd(
                parameters, gradients, buffers, momentum=config.momentum, nesterov=config.nesterov, dampening=0.0,
                **options, **fused,
            )  # fmt: skip
        else:
            adamw(
                parameters, gradients, state["exp_avg"], state["exp_avg_sq"], [], state["step"], beta1=config.beta1,
                beta2=config.beta2, eps=config.eps, amsgrad=False, **options, **fused,
            )  # fmt: skip

    def _state_lists(self, parameters: list[Tensor]) -> dict[str, list[Tensor]]:
        """Return the optimizer tensors of these parameters, one list per name."""
        states = [self.state[p] for p in parameters if p in self.state]
        return {name: [state[name] for state in states] for name in (states[0] if states else ())}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class ParameterGroup(NamedTuple):
    """Parameters that are updated alike. `rule` is sgd, adamw or muon; `lr_factor` multiplies the schedule's rate."""

    parameters: list[Tensor]
    rule: str
    lr_factor: float
    weight_decay: float


def parameter_groups(config: AnyOptim, parameters: Iterable[Tensor], dims: Iterable[int]) -> list[ParameterGroup]:
    """Split parameters into weights, and biases and norm weights; for Muon the last layer's weight is in a third group.

    Any group may be empty.

    Args:
        parameters: in the order of the model, whose last parameter with two or more dimensions is its last layer's weight.
        dims: number of dimensions of each.
    """
    weights, others = list[Tensor](), list[Tensor]()
    for parameter, dimensions in zip(parameters, dims, strict=True):
        (weights if dimensions > 1 else others).append(parameter)
    decay = config.weight_decay if config.decay_norm_and_bias else 0.0
    if not isinstance(config, Muon):
        return [
            ParameterGroup(weights, config.name, 1.0, config.weight_decay),
            ParameterGroup(others, config.name, config.bias_lr_factor, decay),
        ]
    factor = config.adamw_lr / config.lr
    return [
        ParameterGroup(weights[:-1], "muon", 1.0, config.weight_decay),
        ParameterGroup(weights[-1:], "adamw", factor, config.weight_decay),
        ParameterGroup(others, "adamw", factor * config.bias_lr_factor, decay),
    ]


def initial_state(config: AnyOptim, parameter: Tensor, rule: str | None = None) -> dict[str, Tensor]:
    """Return the optimizer tensors of a parameter before the first step, under torch's names.

    Args:
        rule: of its group; by default the optimizer's only one.
    """
    if (rule or config.name) == "adamw":
        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": count, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    # From a buffer of zeros, the first step leaves the gradient in it, as torch.optim.SGD does.
    has_momentum = not isinstance(config, Sgd) or config.momentum
    return {"momentum_buffer": torch.zeros_like(parameter)} if has_momentum else {}
