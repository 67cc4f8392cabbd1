"""The rows of all shards of all ranks, from an exchange that knows one row a rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from distributed.collectives import world_size
from distributed.tree import leaves_of


class ShardRows:
    """Called with a row of each of this rank's shards; returns those of all, [shards, len(row)]; a collective.

    Args:
        gather: every rank's row, [world_size, length], in order of rank.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor] | None, *, shards: int) -> None:
        held = [leaves_of(rank, world_size(), shards) for rank in range(world_size())]
        self._gather = gather
        # Every rank sends as many rows as the one that holds most; what is too much is dropped here.
        self._most = max(map(len, held))
        self._places = [rank * self._most + place for rank, own in enumerate(held) for place in range(len(own))]

    def __call__(self, rows: list[Tensor]) -> Tensor:
        if self._gather is None:
            return torch.stack(rows)
        sent = torch.cat(rows + [rows[0]] * (self._most - len(rows)))
        received = self._gather(sent).view(-1, len(rows[0]))
        return received if len(received) == len(self._places) else received[self._places]
