"""Gathers the statistics rows of all shards through an all-gather of one row per rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from distributed.comm.collectives import world_size
from distributed.comm.reduction_tree import shard_range


class StatisticsGather:
    """Gathers one row per shard; a collective.

    Args:
        gather: all-gather of one row per rank, [world_size, length], ordered by rank; None for a single process.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor] | None, *, shards: int) -> None:
        self._gather = gather
        self._counts = [len(shard_range(rank, world_size(), shards)) for rank in range(world_size())]
        # Every rank sends as many rows as the rank with the most shards; the surplus is dropped after the gather.
        self._max_count = max(self._counts)

    def __call__(self, rows: list[Tensor]) -> Tensor:
        """Return the rows of all shards, [shards, length], given those of this rank's shards."""
        if self._gather is None:
            return torch.stack(rows)
        sent = torch.cat(rows + [rows[0]] * (self._max_count - len(rows)))
        received = self._gather(sent).view(len(self._counts), self._max_count, len(rows[0]))
        if len(set(self._counts)) == 1:
            return received.flatten(0, 1)
        # Slices instead of a list of indices, which would be copied from the host and make it wait for the device.
        return torch.cat([of_rank[:count] for of_rank, count in zip(received, self._counts, strict=True)])
