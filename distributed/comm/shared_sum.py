"""Sums a buffer over the ranks of a host through memory that they share."""

from typing import Self

import torch

from distributed.comm.collectives import rank, world_size
from distributed.comm.shared_memory import SharedCounters, SharedMemory, open_shared_memory, row_bytes, tensor_in

_WRITTEN, _SUMMED = range(2)


class SharedSum:
    """Sums flat buffers, one per rank: each rank adds up its chunk of all of them. All ranks get the same bits.

    Attributes:
        own: this rank's buffer [length], written by the caller before each `sum`.
        total: the sum over all ranks [length], which they share, so it must not be written to. It is valid from a `sum` to
            the next one. Numbers are added in rank order, in the dtype of the buffers.
    """

    def __init__(self, memory: SharedMemory, length: int, dtype: torch.dtype, *, timeout_seconds: float) -> None:
        self._counters = SharedCounters(memory, count=2, timeout_seconds=timeout_seconds)
        shape = (world_size() + 1, row_bytes(length, dtype) // dtype.itemsize)
        *buffers, self.total = tensor_in(memory, SharedCounters.size(2), shape, dtype)[:, :length]
        self.own = buffers[rank()]
        chunk = slice(rank() * length // world_size(), (rank() + 1) * length // world_size())
        self._chunks, self._chunk_of_total = [buffer[chunk] for buffer in buffers], self.total[chunk]
        self._count = 0

    @classmethod
    def open(cls, length: int, dtype: torch.dtype, device: torch.device, *, timeout_seconds: float) -> Self | None:
        """Return a sum over buffers of `length` numbers, or None if these ranks cannot share memory. A collective."""
        size = SharedCounters.size(2) + (world_size() + 1) * row_bytes(length, dtype)
        memory = open_shared_memory(size, device)
        return cls(memory, length, dtype, timeout_seconds=timeout_seconds) if memory else None

    def sum(self) -> None:
        """Set `total` to the sum of all ranks' buffers. A collective; afterwards `own` may be written again.

        Raises:
            RuntimeError: a rank has died or timed out.
        """
        self._count += 1
        self._counters.publish(_WRITTEN, self._count)
        self._counters.wait(_WRITTEN, self._count)  # now all buffers are written, and nobody reads the previous total
        first, second, *others = self._chunks
        torch.add(first, second, out=self._chunk_of_total)
        for chunk in others:
            self._chunk_of_total += chunk
        self._counters.publish(_SUMMED, self._count)
        self._counters.wait(_SUMMED, self._count)
