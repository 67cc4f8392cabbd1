"""The rows of all shards of all ranks, from an exchange that knows one row a rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from distributed.comm.collectives import world_size
from distributed.comm.reduction_tree import shard_range


class StatisticsGather:
    """Called with a row of each of this rank's shards; returns those of all, [shards, len(row)]; a collective.

    Args:
        gather: every rank's row, [world_size, length], in order of rank.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor] | None, *, shards: int) -> None:
        held = [shard_range(rank, world_size(), shards) for rank in range(world_size())]
        self._gather = gather
        # Every rank sends as many rows as the one that holds most; what is too much is dropped here.
        self._most = max(map(len, held))
        self._counts = [len(own) for own in held]

    def __call__(self, rows: list[Tensor]) -> Tensor:
        if self._gather is None:
            return torch.stack(rows)
        sent = torch.cat(rows + [rows[0]] * (self._most - len(rows)))
        received = self._gather(sent).view(len(self._counts), self._most, len(rows[0]))
        if len(set(self._counts)) == 1:
            return received.flatten(0, 1)
        # Slices, not a list of indices: that would be copied from the host, which waits for the device.
        return torch.cat([of_rank[:count] for of_rank, count in zip(received, self._counts, strict=True)])
