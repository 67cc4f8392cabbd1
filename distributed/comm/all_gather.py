"""All-gather of short rows. Synchronized batch norm blocks on it twice per layer, so its latency counts."""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.comm import collectives
from distributed.comm.shared_memory import SharedCounters, SharedMemory, open_shared_memory, tensor_in

_MAX_ROW_BYTES = 64 * 1024


class AllGather(Protocol):
    """Gathers one row per rank: a collective. All rows have the same length and dtype."""

    def __call__(self, row: Tensor) -> Tensor:
        """Return the rows of all ranks, [world_size, length], ordered by rank."""
        ...


def process_group_all_gather(row: Tensor) -> Tensor:
    """Gather over the default process group: an `AllGather` for any device and any number of hosts."""
    rows = row.new_empty(dist.get_world_size() * len(row))
    collectives.all_gather(rows, row)
    return rows.view(-1, len(row))


def open_all_gather(device: torch.device, *, timeout_seconds: float) -> AllGather:
    """Return the fastest `AllGather` available to these ranks; a collective."""
    memory = open_shared_memory(SharedMemoryAllGather.size(), device)
    return SharedMemoryAllGather(memory, timeout_seconds=timeout_seconds) if memory else process_group_all_gather


class _Slots(NamedTuple):
    """The rows of all ranks [world_size, length], and this rank's [length], in shared memory."""

    all: Tensor
    own: Tensor


class SharedMemoryAllGather:
    """Gathers through memory shared by all ranks: an `AllGather`.

    Each rank has two slots for its row and a counter per slot; odd and even gathers alternate between them. Gather n + 2
    cannot overwrite the rows of gather n too early: it starts after every rank has written its row of gather n + 1, and a
    rank writes that row only after it has read those of gather n.
    """

    def __init__(self, memory: SharedMemory, *, timeout_seconds: float) -> None:
        self._counters = SharedCounters(memory, count=2, timeout_seconds=timeout_seconds)
        self._rank, world_size = collectives.rank(), collectives.world_size()
        self._rows = tensor_in(memory, SharedCounters.size(2), (2, world_size, _MAX_ROW_BYTES), torch.uint8)
        self._slots: dict[tuple[torch.dtype, int], list[_Slots]] = {}
        self._count = 0

    @staticmethod
    def size() -> int:
        """Return the number of bytes of shared memory needed."""
        return SharedCounters.size(2) + 2 * collectives.world_size() * _MAX_ROW_BYTES

    def __call__(self, row: Tensor) -> Tensor:
        length = row.numel() * row.element_size()
        if length > _MAX_ROW_BYTES:
            return process_group_all_gather(row)
        self._count += 1
        parity = self._count % 2
        slots = self._slots_for(row.dtype, length)[parity]
        slots.own.copy_(row)
        self._counters.publish(parity, self._count)
        self._counters.wait(parity, self._count)
        return slots.all.clone()

    def _slots_for(self, dtype: torch.dtype, length: int) -> list[_Slots]:
        """Return the two slots as rows of `length` bytes; cached, since a network has rows of a few lengths only."""
        if (dtype, length) not in self._slots:
            rows = [of_ranks[:, :length].view(dtype) for of_ranks in self._rows]
            self._slots[dtype, length] = [_Slots(of_ranks, of_ranks[self._rank]) for of_ranks in rows]
        return self._slots[dtype, length]
