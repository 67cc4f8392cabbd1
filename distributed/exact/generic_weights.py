"""Weights that hide nothing: a network's initial ones may multiply a branch by zero, or overflow."""

import math

import torch
from torch import Tensor, nn


def fill_constant_weights(model: nn.Module) -> None:
    """Change parameters whose elements are all equal, e.g. a head or a branch's scale that starts at zero.

    Gives new memory to these parameters; the caller restores the old.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in _floating(model):
        data = parameter.detach()
        if bool((data == data.reshape(-1)[0]).all()):
            parameter.data = data + _uniform(parameter, generator)


def redraw_weights(model: nn.Module) -> None:
    """Draw every matrix and convolution anew, so that activations keep their size from layer to layer.

    Gives new memory to these parameters; the caller restores the old.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in _floating(model):
        if parameter.dim() >= 2:
            parameter.data = _uniform(parameter, generator)


def _floating(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.is_floating_point() and p.numel()]


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from [-b, b), b = sqrt(3 / fan in), if there is a fan in, else from [0.1, 0.3)."""
    draws = torch.rand(like.shape, generator=generator, dtype=like.dtype)
    if like.dim() < 2:
        return 0.1 + 0.2 * draws
    return (2 * draws - 1) * math.sqrt(3 / like[0].numel())
