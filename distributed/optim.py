"""Optimizers and weight-decay groups.

torch's functional forms: constructing a torch.optim class imports torch's compiler, which takes over a second.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from distributed.config.sections import Sgd


class Optimizer:
    """SGD over two groups: matrices and filters decay, biases and batch norm's weights only if the config says so.

    `state` has each parameter's tensors by torch's names for them.
    """

    def __init__(self, config: Sgd, model: nn.Module) -> None:
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        decays = [p.dim() > 1 or config.decay_norm_and_bias for p in self.parameters]
        self._groups = [
            ([p for p, d in zip(self.parameters, decays, strict=True) if d], config.weight_decay),
            ([p for p, d in zip(self.parameters, decays, strict=True) if not d], 0.0),
        ]
        self._options: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
        # With nothing in it, the first step leaves the gradient there, as torch's does.
        kept = self.parameters if config.momentum else []
        self.state = {p: {"momentum_buffer": torch.zeros_like(p)} for p in kept}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the parameters' gradients."""
        for parameters, weight_decay in self._groups:
            if parameters:
                gradients: Any = [p.grad for p in parameters]
                buffers: Any = [self.state.get(p, {}).get("momentum_buffer") for p in parameters]
                sgd(
                    parameters, gradients, buffers, lr=lr, weight_decay=weight_decay, dampening=0.0, maximize=False,
                    fused=True, **self._options,
                )  # fmt: skip

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None
