"""Maxima of a few flags over all ranks, returned one call late, so that no rank waits for another."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.comm.collectives import rank, world_size
from distributed.comm.shared_memory import SharedCounters, SharedMemory, open_shared_memory, tensor_in


class DelayedMax(Protocol):
    """Elementwise maximum of a few flags over ranks: whole numbers from 0 on."""

    def exchange(self, *flags: int) -> list[int]:
        """Exchange this rank's flags. Return the maxima of the previous call's flags, at first zeros. A collective."""
        ...

    def drain(self) -> list[int]:
        """Wait for the last `exchange` and return its maxima; zeros if they were returned already."""
        ...


def open_delayed_max(flags: int, *, timeout_seconds: float) -> DelayedMax:
    """Return the fastest `DelayedMax` available to these ranks, for this number of flags. A collective."""
    if world_size() == 1:
        return LocalMax(flags)
    memory = open_shared_memory(SharedMemoryMax.size(flags), torch.device("cpu"))  # flags never are on a GPU
    return SharedMemoryMax(memory, flags, timeout_seconds=timeout_seconds) if memory else ProcessGroupMax(flags)


class LocalMax:
    """For a single process: a `DelayedMax`."""

    def __init__(self, flags: int) -> None:
        self._zeros = self._last = [0] * flags

    def exchange(self, *flags: int) -> list[int]:
        previous, self._last = self._last, list(flags)
        return previous

    def drain(self) -> list[int]:
        previous, self._last = self._last, self._zeros
        return previous


class SharedMemoryMax:
    """Through memory shared by all ranks: a `DelayedMax`.

    Each rank has two rows of flags, which alternate. Exchange n + 1 cannot overwrite the flags of exchange n - 1 too early: it
    starts after every rank has started exchange n, and a rank first reads the flags of exchange n - 1 there.
    """

    def __init__(self, memory: SharedMemory, flags: int, *, timeout_seconds: float) -> None:
        self._counters = SharedCounters(memory, count=1, timeout_seconds=timeout_seconds)
        self._flags = tensor_in(memory, SharedCounters.size(1), (2, world_size(), flags), torch.int64)
        self._own, self._zeros = self._flags[:, rank()], [0] * flags
        self._count, self._is_pending = 0, False

    @staticmethod
    def size(flags: int) -> int:
        """Return the number of bytes of shared memory needed."""
        return SharedCounters.size(1) + 2 * world_size() * flags * 8

    def exchange(self, *flags: int) -> list[int]:
        previous = self.drain()
        self._count += 1
        self._own[self._count % 2] = torch.tensor(flags)
        self._counters.publish(0, self._count)
        self._is_pending = True
        return previous

    def drain(self) -> list[int]:
        if not self._is_pending:
            return self._zeros
        self._counters.wait(0, self._count)
        self._is_pending = False
        return self._flags[self._count % 2].amax(0).tolist()


class ProcessGroupMax:
    """Over the network: a `DelayedMax`. Uses a gloo group of its own, so that the group of the gradients stays free."""

    def __init__(self, flags: int) -> None:
        self._zeros = [0] * flags
        self._group: Any = dist.new_group(backend="gloo")
        self._pending: tuple[Tensor, Tensor, Any] | None = None

    def exchange(self, *flags: int) -> list[int]:
        previous = self.drain()
        sent = torch.tensor(flags, dtype=torch.int32).repeat(world_size())
        received = torch.empty_like(sent)
        # Not all_reduce: gloo's passes the flags around a ring, one rank after another.
        work = dist.all_to_all_single(received, sent, group=self._group, async_op=True)
        self._pending = sent, received, work
        return previous

    def drain(self) -> list[int]:
        if self._pending is None:
            return self._zeros
        _, received, work = self._pending
        work.wait()
        self._pending = None
        return [int(flag) for flag in received.view(world_size(), -1).amax(0).tolist()]
