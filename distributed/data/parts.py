"""Which images a rank needs for its part of some steps."""

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """A rank's part of a micro-batch: ids, int64 [n], the sizes of its shards, and the images that these are mixed with,
    int64 [n], or none, [0]."""

    ids: Tensor
    shard_sizes: tuple[int, ...]
    partners: Tensor


Step = tuple[list[Part], int]
"""A rank's part of each micro-batch, and how many images the step has on all ranks."""


def ids_of(steps: list[Step]) -> Tensor:
    """The ids of all parts, one after the other, int64 [n]."""
    return torch.cat([part.ids for parts, _ in steps for part in parts])


def partners_of(steps: list[Step]) -> Tensor:
    """The partners of all parts in the order of `ids_of`, int64 [n] or [0]."""
    return torch.cat([part.partners for parts, _ in steps for part in parts])


def wanted(steps: list[Step]) -> Tensor:
    """All images that the steps need, int64 [n] or [2 n]: those of `ids_of`, then those of `partners_of`."""
    return torch.cat([ids_of(steps), partners_of(steps)])
