"""Muon: momentum whose update of a matrix is replaced by the nearest orthogonal one (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/)."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ITERATIONS = 3
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that moves singular values towards 1, to between about 0.7 and 1.2 after a few iterations."""


def muon(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    dtype: torch.dtype | None = None,
    skip: Tensor | None = None,
) -> None:
    """Update parameters and their momentum buffers in place; filters count as matrices of their output channels.

    Args:
        weight_decay: each step multiplies a weight by 1 - lr * weight_decay.
        dtype: computes the orthogonal updates; by default that of the parameters. bfloat16 is exact enough.
        skip: a scalar on the device; 1.0: change nothing.
    """
    for parameter, gradient, buffer in zip(parameters, gradients, buffers, strict=True):
        average = momentum * buffer + gradient
        ahead = gradient + momentum * average  # Nesterov
        matrix = ahead.reshape(len(ahead), -1)
        update = orthogonalized(matrix.to(dtype)).to(parameter.dtype).view(ahead.shape)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        new = parameter * (1 - lr * weight_decay) - lr * scale * update
        buffer.copy_(average if skip is None else torch.where(skip != 0, buffer, average))
        parameter.copy_(new if skip is None else torch.where(skip != 0, parameter, new))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return an approximation of U @ V.T, where U @ S @ V.T is the singular value decomposition: [rows, columns].

    A Newton-Schulz iteration: only products of matrices.
    """
    a, b, c = _COEFFICIENTS
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
