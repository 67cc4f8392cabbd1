"""How two tensors differ, wherever each of them is: their bits, or an error relative to the largest number."""

from collections.abc import Mapping

import torch
from torch import Tensor


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes in the order of its indices, whatever its memory layout: uint8 [numel * itemsize]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether shape, type and every bit agree, zeros' signs and NaNs included; both may be on different devices."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.device != expected.device:
        found, expected = found.cpu(), expected.cpu()
    return torch.equal(bits(found), bits(expected))


def unlike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names under which the two have different bits, or which only one of them has."""
    names = [*expected, *(name for name in found if name not in expected)]
    return [n for n in names if n not in found or n not in expected or not same_bits(found[n], expected[n])]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected number, in float64; infinite if shapes differ or a number is NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    wide, right = found.detach().cpu().double(), expected.detach().cpu().double()
    largest = (wide - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return float("inf") if largest.isnan() else float(largest)
