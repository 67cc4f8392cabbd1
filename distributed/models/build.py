"""From the config's section to a model with its initial weights, which are keyed by (seed, parameter name)."""

import math

from torch import nn

from distributed import keyed
from distributed.config.sections import Model
from distributed.models import alexnet


def build_model(config: Model, *, num_classes: int, seed: int) -> nn.Module:
    """The network named by the config, in float32 on the CPU, the same bits for the same seed anywhere."""
    model: nn.Module = getattr(alexnet, config.name)(num_classes, config.dropout)
    initialize(model, seed=seed)
    return model


def initialize(model: nn.Module, *, seed: int) -> None:
    """torch's own distribution, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for weights and biases of convolutions and linear
    layers (Kaiming uniform with a = sqrt(5)); batch norm starts as the identity, as torch leaves it."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for name, parameter in module.named_parameters(recurse=False):
                keyed.fill_uniform_(parameter, bound, seed=seed, name=f"{prefix}.{name}")
