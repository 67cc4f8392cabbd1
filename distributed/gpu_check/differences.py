"""Compares two tensors, which may be on different devices: bit for bit, or by an error relative to the largest number."""

from collections.abc import Mapping

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bytes in index order, whatever its memory format: uint8 [numel * itemsize]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether shape, dtype and every bit agree, including the signs of zeros and NaNs."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.device != expected.device:
        found, expected = found.cpu(), expected.cpu()
    return torch.equal(bits(found), bits(expected))


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensors differ in a bit or that only one of the two has."""
    names = [*expected, *(name for name in found if name not in expected)]
    return [n for n in names if n not in found or n not in expected or not same_bits(found[n], expected[n])]


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference divided by the largest expected number, in float64.

    Infinite if shapes differ or a number is NaN.
    """
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    relative = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float("inf") if relative.isnan() else float(relative)
