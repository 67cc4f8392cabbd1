"""All-gather of small rows, the exchange that batch norm waits for twice a layer: through shared memory on one host.

gloo needs two thread switches and a trip through the network stack for each, most of a millisecond on a virtual
machine; ranks on one host that look at each other's memory need some microseconds.
"""

import mmap
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import collectives
from distributed.topology import host

_ROW_BYTES = 64 * 1024
_SPINS = 2000  # some hundred microseconds: a rank with a core of its own is there by then
_LOOK_SECONDS = 0.1


class RowGather(Protocol):
    """Called by all ranks with rows of one length and dtype; returns all of them, [world_size, length], in order of rank."""

    def __call__(self, row: Tensor) -> Tensor: ...


def gather_by_process_group(row: Tensor) -> Tensor:
    """A `RowGather` over the default process group, for any device and any hosts."""
    rows = row.new_empty(dist.get_world_size() * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(-1, len(row))


def open_row_gather(device: torch.device, *, timeout_seconds: float) -> RowGather:
    """The fastest `RowGather` for these ranks; a collective."""
    hosts = set(collectives.gather_objects((host(), device.type)))
    if hosts != {(host(), "cpu")}:
        return gather_by_process_group
    path = None
    if collectives.rank() == 0:
        handle, path = tempfile.mkstemp(
            prefix="distributed-rows-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
        )
        os.ftruncate(handle, SharedMemoryGather.size(collectives.world_size()))
        os.close(handle)
    path = collectives.from_main(path)
    gather = SharedMemoryGather.attach(path, timeout_seconds=timeout_seconds)
    attached = all(collectives.gather_objects(gather is not None))  # one host name may stand for two containers
    if collectives.rank() == 0:
        Path(path).unlink()
    return gather if attached and gather is not None else gather_by_process_group


class SharedMemoryGather:
    """A `RowGather` through a file mapped by all ranks.

    Each rank has a slot for its row and a counter of the rows it has written, twice: odd and even exchanges take turns.
    Nobody can write exchange n + 2 over n before all have written n + 1, and whoever wrote that has read n.
    """

    def __init__(self, memory: mmap.mmap, *, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        # A counter has a cache line of its own, so that writing one does not stall who reads another.
        self._counters = np.frombuffer(memory, np.int64, count=2 * world_size * 8).reshape(2, world_size, 8)[:, :, 0]
        rows = torch.frombuffer(memory, dtype=torch.uint8, offset=2 * world_size * 64)
        self._rows = rows.view(2, world_size, _ROW_BYTES)
        self._exchange = 0
        self._fence = threading.Lock()
        self._pids: list[int] = collectives.gather_objects(os.getpid())

    @staticmethod
    def size(world_size: int) -> int:
        return 2 * world_size * (64 + _ROW_BYTES)

    @classmethod
    def attach(cls, path: str, *, timeout_seconds: float) -> "SharedMemoryGather | None":
        """Map rank 0's file; None where this rank cannot see it."""
        try:
            with open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
        except OSError:
            memory = None
        if not all(collectives.gather_objects(memory is not None)) or memory is None:
            return None
        return cls(
            memory, rank=collectives.rank(), world_size=collectives.world_size(), timeout_seconds=timeout_seconds
        )

    def __call__(self, row: Tensor) -> Tensor:
        length = row.numel() * row.element_size()
        if length > _ROW_BYTES:
            return gather_by_process_group(row)
        self._exchange += 1
        turn = self._exchange % 2
        counters, slots = self._counters[turn], self._rows[turn, :, :length]
        slots[self.rank].copy_(row.view(torch.uint8))
        # Taking and giving a lock orders the row before the counter on processors that reorder stores (x86 does not).
        with self._fence:
            pass
        counters[self.rank] = self._exchange
        for rank in range(self.world_size):
            if counters[rank] != self._exchange:
                self._await(counters, rank)
        with self._fence:
            pass
        return slots.clone().view(row.dtype)

    def _await(self, counters: "np.ndarray[tuple[int], np.dtype[np.int64]]", rank: int) -> None:
        """Spin, then give way, then sleep, until that rank has come.

        Raises:
            RuntimeError: it is dead, or did not come in time.
        """
        wanted = self._exchange
        for _ in range(_SPINS):
            if counters[rank] == wanted:
                return
        start = looked = time.monotonic()
        while counters[rank] != wanted:
            now = time.monotonic()
            if now - start < 0.005:
                os.sched_yield()
            else:
                time.sleep(0.0005)
            if now - looked > _LOOK_SECONDS:
                looked = now
                if not _alive(self._pids[rank]):
                    raise RuntimeError(f"connection closed by peer: rank {rank}, process {self._pids[rank]}, has died")
                if now - start > self.timeout_seconds:
                    raise RuntimeError(f"timed out waiting {self.timeout_seconds:.0f} s for rank {rank}")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
