"""Compares two tensors, which may be on different devices: bit for bit, or by an error relative to the largest number."""

from collections.abc import Mapping

from torch import Tensor

from distributed.exact import bits


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether shape, dtype and every bit agree, including the signs of zeros and NaNs."""
    if found.device != expected.device:
        found, expected = found.cpu(), expected.cpu()
    return bits.same_bits(found, expected)


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
