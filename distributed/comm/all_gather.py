"""All-gather of small rows, the exchange that batch norm waits for twice a layer."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.comm import collectives
from distributed.comm.shared_memory import SharedCounters, SharedMemory, open_shared_memory, tensor_in

_ROW_BYTES = 64 * 1024


class AllGather(Protocol):
    """Called by all ranks with rows of one length and dtype; returns all of them, [world_size, length], in order of rank."""

    def __call__(self, row: Tensor) -> Tensor: ...


def process_group_all_gather(row: Tensor) -> Tensor:
    """A `RowGather` over the default process group, for any device and any hosts."""
    rows = row.new_empty(dist.get_world_size() * len(row))
    collectives.all_gather(rows, row)
    return rows.view(-1, len(row))


def open_all_gather(device: torch.device, *, timeout_seconds: float) -> AllGather:
    """The fastest `RowGather` for these ranks; a collective."""
    memory = open_shared_memory(SharedMemoryAllGather.size(), device)
    return SharedMemoryAllGather(memory, timeout_seconds=timeout_seconds) if memory else process_group_all_gather


class SharedMemoryAllGather:
    """A `RowGather` through memory that all ranks see.

    Each rank has a slot for its row and a count of the rows it has written, twice: odd and even exchanges take turns.
    Nobody can write exchange n + 2 over n before all have written n + 1, and whoever wrote that has read n.
    """

    def __init__(self, memory: SharedMemory, *, timeout_seconds: float) -> None:
        self._counters = SharedCounters(memory, 0, count=2, timeout_seconds=timeout_seconds)
        self._rank, world_size = collectives.rank(), collectives.world_size()
        self._rows = tensor_in(memory, SharedCounters.size(2), (2, world_size, _ROW_BYTES), torch.uint8)
        self._exchange = 0

    @staticmethod
    def size() -> int:
        """Bytes of memory that it needs."""
        return SharedCounters.size(2) + 2 * collectives.world_size() * _ROW_BYTES

    def __call__(self, row: Tensor) -> Tensor:
        length = row.numel() * row.element_size()
        if length > _ROW_BYTES:
            return process_group_all_gather(row)
        self._exchange += 1
        turn = self._exchange % 2
        slots = self._rows[turn, :, :length]
        slots[self._rank].copy_(row.view(torch.uint8))
        self._counters.publish(turn, self._exchange)
        self._counters.wait(turn, self._exchange)
        return slots.clone().view(row.dtype)
