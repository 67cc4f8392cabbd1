"""Memory that all ranks of one host see, and signals in it: exchanges without a trip through the network stack.

gloo needs two thread switches and several copies for each exchange, most of a millisecond on a virtual machine; ranks
that look at each other's memory need some microseconds.
"""

import fcntl
import mmap
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distributed.comm import collectives
from distributed.topology import host, machine

_LINE = 64  # bytes of a cache line: signals on lines of their own do not stall who reads another
_SPINS = 2000  # some hundred microseconds: a rank with a core of its own is there by then
_LOOK_SECONDS = 0.1
_NAME_BYTES = 16


class SharedMemory:
    """`size` bytes that all ranks see, and which of the ranks live. Made by `open_shared_memory`.

    A rank that lives holds a lock on a byte of the file, which the kernel lets go of when the process ends. Process ids would
    not do: in containers two processes may have one, or see none of each other's.
    """

    def __init__(self, path: str, size: int) -> None:
        # Closed with the last of its tensors: to close any descriptor of the file lets go of all locks of the process.
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
        self.bytes = mmap.mmap(self._file.fileno(), size)
        self.name = self.bytes[-_NAME_BYTES:]
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, collectives.rank())

    def is_alive(self, rank: int) -> bool:
        """Whether that rank's process has not ended; one that is stopped lives."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return False


def open_shared_memory(size: int, device: torch.device) -> SharedMemory | None:
    """`size` bytes of zeros, the same for all ranks; None if they do not all compute on CPUs and see one memory, or if
    there is not so much of it to give. A collective.

    That they see one memory is tried out: host names may be the same for two containers, and differ for one memory.
    """
    size += _NAME_BYTES
    if set(collectives.gather_objects((machine(), device.type))) != {(machine(), "cpu")}:
        return None
    path, name = collectives.from_main(_new_file(size) if collectives.rank() == 0 else None) or ("", b"")
    memory = None
    if path:
        with suppress(OSError, ValueError):  # in a container with memory of its own, or as another user
            memory = SharedMemory(path, size)
    everybody = all(collectives.gather_objects(memory is not None and memory.name == name))
    if collectives.rank() == 0 and path:
        Path(path).unlink(missing_ok=True)
    return memory if everybody else None


def _new_file(size: int) -> tuple[str, bytes] | None:
    """A file of zeros, and the random name that it ends with."""
    name = os.urandom(_NAME_BYTES)
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        handle, path = tempfile.mkstemp(prefix="distributed-", dir=folder)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, size)  # a container may have 64 MB there; found out later, it is a SIGBUS
        os.pwrite(handle, name, size - _NAME_BYTES)
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(handle)
    return path, name


class Signals:
    """Numbers that each rank counts up for the others to wait for; made by all ranks alike, a collective.

    Args:
        memory, offset: where they lie; `size(kinds)` bytes.
        kinds: how many numbers each rank has.
    """

    def __init__(self, memory: SharedMemory, offset: int, *, kinds: int, timeout_seconds: float) -> None:
        self._rank, self._world_size, self._timeout = collectives.rank(), collectives.world_size(), timeout_seconds
        numbers = np.frombuffer(memory.bytes, np.int64, count=self.size(kinds) // 8, offset=offset)
        self._numbers = numbers.reshape(kinds, self._world_size, _LINE // 8)[:, :, 0]
        self._fence = threading.Lock()
        self._memory = memory
        self._processes: list[str] = collectives.gather_objects(f"process {os.getpid()} on {host()}")

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
                if not self._memory.is_alive(rank):
                    raise RuntimeError(f"connection closed by peer: rank {rank}, {self._processes[rank]}, has died")
                if now - start > self._timeout:
                    raise RuntimeError(f"timed out waiting {self._timeout:.0f} s for rank {rank}")


def tensor_in(memory: SharedMemory, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over a part of the memory, which stays mapped as long as the tensor lives."""
    count = 1
    for side in shape:
        count *= side
    return torch.frombuffer(memory.bytes, dtype=dtype, count=count, offset=offset).view(shape)
