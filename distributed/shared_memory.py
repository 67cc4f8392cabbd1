"""Memory that all ranks of one host see, and signals in it: exchanges without a trip through the network stack.

gloo needs two thread switches and several copies for each exchange, most of a millisecond on a virtual machine; ranks
that look at each other's memory need some microseconds.
"""

import mmap
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distributed import collectives
from distributed.topology import host

_LINE = 64  # bytes of a cache line: signals on lines of their own do not stall who reads another
_SPINS = 2000  # some hundred microseconds: a rank with a core of its own is there by then
_LOOK_SECONDS = 0.1


def open_shared_memory(size: int, device: torch.device) -> mmap.mmap | None:
    """`size` bytes of zeros, the same for all ranks; None where they do not all compute on the CPUs of one host, or where
    the host has not so much shared memory to give. A collective."""
    if set(collectives.gather_objects((host(), device.type))) != {(host(), "cpu")}:
        return None
    path = collectives.from_main(_new_file(size) if collectives.rank() == 0 else None)
    memory = None
    if path is not None:
        try:
            with open(path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), size)
        except OSError:
            pass  # one host name may stand for two containers
    everybody = all(collectives.gather_objects(memory is not None))
    if collectives.rank() == 0 and path is not None:
        Path(path).unlink()
    return memory if everybody else None


def _new_file(size: int) -> str | None:
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        handle, path = tempfile.mkstemp(prefix="distributed-", dir=folder)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, size)  # a container may have 64 MB there; found out later, it is a SIGBUS
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)
    return path


class Signals:
    """Numbers that each rank counts up for the others to wait for; made by all ranks alike, a collective.

    Args:
        memory, offset: where they lie; `size(kinds)` bytes.
        kinds: how many numbers each rank has.
    """

    def __init__(self, memory: mmap.mmap, offset: int, *, kinds: int, timeout_seconds: float) -> None:
        self._rank, self._world_size, self._timeout = collectives.rank(), collectives.world_size(), timeout_seconds
        numbers = np.frombuffer(memory, np.int64, count=self.size(kinds) // 8, offset=offset)
        self._numbers = numbers.reshape(kinds, self._world_size, _LINE // 8)[:, :, 0]
        self._fence = threading.Lock()
        self._pids: list[int] = collectives.gather_objects(os.getpid())

    @staticmethod
    def size(kinds: int) -> int:
        return kinds * collectives.world_size() * _LINE

    def give(self, kind: int, value: int) -> None:
        """What this rank wrote before is there for whoever has waited for the value."""
        # Taking and giving a lock orders stores on processors that reorder them (x86 does not).
        with self._fence:
            pass
        self._numbers[kind, self._rank] = value

    def wait(self, kind: int, value: int) -> None:
        """Until every rank has given at least this value.

        Raises:
            RuntimeError: one is dead, or did not come in time.
        """
        numbers = self._numbers[kind]
        for rank in range(self._world_size):
            if numbers[rank] < value:
                self._wait_for(numbers, rank, value)
        with self._fence:
            pass

    def _wait_for(self, numbers: "np.ndarray[tuple[int], np.dtype[np.int64]]", rank: int, value: int) -> None:
        """Spin, then give way, then sleep."""
        for _ in range(_SPINS):
            if numbers[rank] >= value:
                return
        start = looked = time.monotonic()
        while numbers[rank] < value:
            now = time.monotonic()
            if now - start < 0.005:
                os.sched_yield()
            else:
                time.sleep(0.0005)
            if now - looked > _LOOK_SECONDS:
                looked = now
                if not _alive(self._pids[rank]):
                    raise RuntimeError(f"connection closed by peer: rank {rank}, process {self._pids[rank]}, has died")
                if now - start > self._timeout:
                    raise RuntimeError(f"timed out waiting {self._timeout:.0f} s for rank {rank}")


def tensor_in(memory: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over a part of the memory, which stays mapped as long as the tensor lives."""
    count = 1
    for side in shape:
        count *= side
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
