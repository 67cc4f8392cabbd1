"""Which images a rank needs for its part of some micro-batches."""

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """A rank's part of a micro-batch: ids, int64 [n], the sizes of its shards, and the images that these are mixed with,
    int64 [n], or none, [0]."""

    ids: Tensor
    shard_sizes: tuple[int, ...]
    partners: Tensor


MicroBatch = tuple[Part, int]
"""A rank's part of a micro-batch, and how many images its step has on all ranks."""


def ids_of(block: list[MicroBatch]) -> Tensor:
    """The ids of all parts, one after the other, int64 [n]."""
    return torch.cat([part.ids for part, _ in block])


def partners_of(block: list[MicroBatch]) -> Tensor:
    """The partners of all parts in the order of `ids_of`, int64 [n] or [0]."""
    return torch.cat([part.partners for part, _ in block])


def wanted(block: list[MicroBatch]) -> Tensor:
    """All images that the micro-batches need, int64 [n] or [2 n]: those of `ids_of`, then those of `partners_of`."""
    return torch.cat([ids_of(block), partners_of(block)])
