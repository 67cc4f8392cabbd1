"""Optimizers and weight-decay groups."""

import torch
from torch import nn

from distributed.config.tree import Sgd


def build_optimizer(config: Sgd, model: nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """SGD over two groups: matrices and filters decay, biases and batch norm's weights only if the config says so."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 or config.decay_norm_and_bias]
    plain = [p for p in parameters if not (p.dim() > 1 or config.decay_norm_and_bias)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
