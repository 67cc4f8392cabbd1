"""From the config's section to a model with its initial weights, which are keyed by (seed, parameter name)."""

import math
from typing import Literal

from torch import nn

from distributed import rng
from distributed.config.sections import Model
from distributed.models import alexnet


def build_model(config: Model, *, num_classes: int, seed: int) -> nn.Module:
    """The network named by the config, in float32 on the CPU, the same bits for the same seed anywhere."""
    model: nn.Module = getattr(alexnet, config.name)(num_classes, config.dropout)
    initialize(model, seed=seed, how=config.init)
    return model


def initialize(model: nn.Module, *, seed: int, how: Literal["torch", "he"] = "torch") -> None:
    """Fill the weights of convolutions and linear layers; batch norm starts as the identity, as torch leaves it.

    torch: its own distribution, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for biases too (Kaiming uniform with a = sqrt(5)). It
    shrinks what goes through each layer, which batch norm makes good. he: U(-sqrt(6/fan_in), sqrt(6/fan_in)) keeps it at
    its size through ReLUs (He et al. 2015, arXiv 1502.01852), biases zero.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = math.sqrt((6 if how == "he" else 1) / module.weight[0].numel())
            for name, parameter in module.named_parameters(recurse=False):
                if how == "he" and name == "bias":
                    nn.init.zeros_(parameter)
                else:
                    rng.fill_uniform_(parameter, bound, seed=seed, name=f"{prefix}.{name}")
