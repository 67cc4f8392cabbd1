"""A counter-based random number generator: draws are hashes of (seed, epoch, sample id) or (seed, parameter name).

Any rank, device or attempt computes the same draw, so there is no generator state to save. All arithmetic is on int64 tensors
that hold 32-bit values: a product with a constant of magnitude below 2**31 never overflows, so eager and compiled code agree.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
# The two multipliers of lowbias32 (Wellons, https://nullprogram.com/blog/2018/07/31/), the second one minus 2**32.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
_GOLDEN = 0x9E3779B9  # odd: its multiples differ modulo 2**32


def _mix_(x: Tensor, between: Tensor | int = 0) -> Tensor:
    """Apply lowbias32 in place to int64 values in [0, 2**32); `between` is a second key, mixed in between the two rounds."""
    x.bitwise_xor_(x >> 16).mul_(_FIRST).bitwise_and_(_LOW).bitwise_xor_(between)
    x.bitwise_xor_(x >> 15).mul_(_SECOND).bitwise_and_(_LOW)
    return x.bitwise_xor_(x >> 16)


def key_words(*parts: int | str) -> tuple[int, int]:
    """Return two 32-bit words that represent these parts, e.g. a seed, an epoch and a name, in the hash."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def sample_keys(ids: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return one key per sample, which determines all of its draws in an epoch.

    Args:
        ids: int64 [n], positions of the samples in the training set.

    Returns:
        int64 [n, 2], each value in [0, 2**32).
    """
    first, second = key_words("sample", seed, epoch)
    return torch.stack([_mix_(ids ^ first, second), _mix_(ids ^ second, first)], dim=1)


def draws(keys: Tensor, purpose: str) -> Tensor:
    """Draw one number per sample, uniform in [0, 2**32), for one purpose (`crop_y`, `flip`): int64 [n]."""
    first, second = key_words(purpose)
    return _mix_(keys[:, 0] ^ first, keys[:, 1] ^ second)


def integers(keys: Tensor, purpose: str, below: int) -> Tensor:
    """Draw one integer per sample, uniform in [0, below), `below` at most 2**31: int64 [n]."""
    return (draws(keys, purpose) * below) >> 32


def unit(keys: Tensor, purpose: str) -> Tensor:
    """Draw one number per sample, uniform in (0, 1): float64 [n]."""
    return (draws(keys, purpose).to(torch.float64) + 0.5) * 2.0**-32


def unit_of_each(keys: Tensor, purposes: tuple[str, ...]) -> Tensor:
    """Like `unit`, for several purposes in one batch of operations: float64 [len(purposes), n]."""
    return (draws_of_each(keys, purposes).to(torch.float64) + 0.5) * 2.0**-32


def draws_of_each(keys: Tensor, purposes: tuple[str, ...]) -> Tensor:
    """Like `draws`, for several purposes in one batch of operations: int64 [len(purposes), n]."""
    first, second = _key_words_of_each(purposes, keys.device)
    return _mix_(keys[:, 0] ^ first, keys[:, 1] ^ second)


@lru_cache
def _key_words_of_each(purposes: tuple[str, ...], device: torch.device) -> Tensor:
    """Return the key words of purposes, int64 [2, len(purposes), 1]. Cached: copying them to a GPU blocks."""
    return torch.tensor([key_words(purpose) for purpose in purposes], dtype=torch.int64).T[:, :, None].to(device)


def permutation(count: int, *, seed: int, epoch: int, device: torch.device | None = None) -> Tensor:
    """Return the order of an epoch, int64 [count]: the ids sorted by 63-bit hashes, stably."""
    keys = sample_keys(torch.arange(count, device=device), seed=seed, epoch=epoch)
    first, second = draws(keys, "order_high"), draws(keys, "order_low")
    return torch.argsort((first << 31) | (second >> 1), stable=True)


def layer_words(name: str) -> tuple[int, int]:
    """Return the key words of a layer's units."""
    return key_words("units", name)


def unit_keys(words: tuple[int, int], count: int, *, use: int = 0, device: torch.device | None = None) -> Tensor:
    """Return one key per two units of a layer, for `at_least16`: int64 [ceil(count / 2)].

    Args:
        words: from `layer_words`.
        use: number of this call of the layer in a forward pass, from 0.
    """
    first, second = words
    second ^= use * _GOLDEN & _LOW
    return _mix_(torch.arange((count + 1) // 2, device=device) ^ first, second)


def at_least16(keys: Tensor, units: Tensor, threshold: int) -> Tensor:
    """Draw a number per sample and unit, uniform in [0, 65536), and compare it with a threshold in that range.

    Each hash serves two units. Numbers of units are not stored: they would take eight bytes each.

    Args:
        keys: int64 [n, 2] from `sample_keys`.
        units: from `unit_keys`.

    Returns:
        bool [n, 2 * len(units)].
    """
    mixed = _mix_(keys[:, :1] ^ units, keys[:, 1:])
    high = mixed >= threshold << 16
    return torch.cat([mixed.bitwise_and_(0xFFFF) >= threshold, high], dim=1)


def fill_uniform_(tensor: Tensor, bound: float, *, seed: int, name: str) -> None:
    """Fill a tensor with numbers uniform in [-bound, bound) that depend only on (seed, name, position in the tensor)."""
    flat = tensor.detach().view(-1)
    for start, stop in _chunks(flat.numel()):
        keys = sample_keys(torch.arange(start, stop), seed=seed, epoch=0)
        numbers = draws(keys, name).to(torch.float64).mul_(2.0**-31).sub_(1.0).mul_(bound)
        flat[start:stop] = numbers.to(flat.dtype)


def _chunks(count: int, size: int = 1 << 18) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)
