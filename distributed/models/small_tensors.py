"""Small tensors that batch norm needs at every call besides its input: sizes of the shards, and constant vectors.

On the CPU both are kept from one batch to the next, since making a small tensor takes as long as an operation on it. On CUDA
they are made anew: reading sizes would make the host wait, and a CUDA graph fills what was made while it was captured only
when it is replayed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from distributed.comm.reduction_tree import tree_sum

T = TypeVar("T")
_CPU = torch.device("cpu")


def _keeps(device: torch.device) -> bool:
    return device == _CPU and not torch.compiler.is_compiling()


def _kept_on_cpu(make: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function whose last argument is a device."""
    kept = lru_cache(maxsize=1024)(make)

    def get(*arguments: Any) -> T:
        return kept(*arguments) if _keeps(arguments[-1]) else make(*arguments)

    return get


@_kept_on_cpu
def filled(length: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of equal numbers, which must not be written to."""
    return torch.full((length,), value, dtype=dtype, device=device)


@_kept_on_cpu
def scratch(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector that kernels may write to and nobody reads."""
    return torch.empty(length, dtype=dtype, device=device)


class Sizes(NamedTuple):
    """How a batch is divided into shards.

    fractions: each shard's fraction of the elements, [shards, 1].
    total: number of elements per channel, [1].
    unbiased: the unbiased variance, divided by the biased one, [1].
    """

    fractions: Tensor
    total: Tensor
    unbiased: Tensor


def sizes_of(counts: Tensor) -> Sizes:
    """Return the sizes, given the number of elements per channel of each shard [shards, 1]."""
    if _keeps(counts.device):
        return _kept_sizes(tuple(counts.flatten().tolist()), counts.dtype)
    return _sizes(counts)


@lru_cache(maxsize=1024)
def _kept_sizes(counts: tuple[float, ...], dtype: torch.dtype) -> Sizes:
    return _sizes(torch.tensor(counts, dtype=dtype).view(-1, 1))


def _sizes(counts: Tensor) -> Sizes:
    total = tree_sum(counts)
    return Sizes(counts / total, total, total / (total - 1).clamp(min=1))
