"""Memory shared by all ranks of a host, and counters in it: synchronization without the network stack.

A gloo collective costs two thread switches and several copies, most of a millisecond on a virtual machine. Ranks that poll
shared memory need a few microseconds.
"""

import fcntl
import io
import math
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
from distributed.host.cpu_quota import available_cpus
from distributed.host.identity import boot_id, host
from distributed.process import exits

_CACHE_LINE = 64  # bytes; each counter has a line of its own, so that writing one does not stall readers of another
_SPINS = 2000  # a few hundred microseconds: by then a rank with a core of its own has arrived
_YIELD_SECONDS = 0.005
_SLEEP_SECONDS = 0.0005
_CHECK_SECONDS = 0.1
_NAME_BYTES = 16


class SharedMemory:
    """`size` bytes of a file that all ranks map. Also detects ranks that have died. Created by `open_shared_memory`.

    Each rank locks one byte of the file; the kernel releases the lock when the process ends. Process ids would not
    work: processes in different containers may have the same one, or may not see each other's.
    """

    def __init__(self, file: io.FileIO, size: int) -> None:
        # Stays open as long as tensors over it exist: closing any descriptor of the file releases all locks of the process.
        self._file = file
        self.bytes = mmap.mmap(file.fileno(), size)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, collectives.rank())

    def is_alive(self, rank: int) -> bool:
        """Whether that rank's process has not ended. A stopped process counts as alive."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return False


def open_shared_memory(size: int, device: torch.device) -> SharedMemory | None:
    """Map `size` zeroed bytes on all ranks. A collective.

    Return None if the ranks do not all compute on CPUs, do not share memory, or if there is not enough of it. Whether they
    share memory is tested with a small file: two containers may have the same host name, or different names and one memory.
    The file has no name any more when it gets its size: what a killed process leaves behind would last until a reboot.
    """
    if set(collectives.gather_objects((boot_id(), device.type))) != {(boot_id(), "cpu")}:
        return None
    created: list[str] = []

    def remove(_: object = None) -> None:
        for file in created:
            Path(file).unlink(missing_ok=True)

    file = memory = None
    exits.add_exit_hook(remove)  # an immediate exit does not run `finally`
    try:
        own = _create_file(created) if collectives.rank() == 0 else None
        path, name = collectives.broadcast_object(own) or ("", b"")
        if path:
            with suppress(OSError):  # in a container with memory of its own, or as another user
                file = open(path, "r+b", buffering=0)  # noqa: SIM115
        is_shared = all(
            collectives.gather_objects(file is not None and os.pread(file.fileno(), _NAME_BYTES, 0) == name)
        )
    finally:  # also if another rank was lost
        remove()
        exits.remove_exit_hook(remove)
    if file and is_shared and collectives.broadcast_object(_allocate(file, size) if collectives.rank() == 0 else None):
        with suppress(OSError, ValueError):
            memory = SharedMemory(file, size)
        is_shared = all(collectives.gather_objects(memory is not None))
    if file and not (memory and is_shared):
        file.close()
    return memory if is_shared else None


def _create_file(created: list[str]) -> tuple[str, bytes] | None:
    """Create a file that holds a random name. Return its path, which is added to `created`, and that name."""
    name = os.urandom(_NAME_BYTES)
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    try:
        handle, path = tempfile.mkstemp(prefix="distributed-", dir=folder)
    except OSError:
        return None
    created.append(path)
    try:
        os.write(handle, name)
    except OSError:
        return None
    finally:
        os.close(handle)
    return path, name


def _allocate(file: io.FileIO, size: int) -> bool:
    """Fill the file with `size` zeros; return whether there is enough memory.

    Now, because a container may have 64 MB of shared memory, and a later write beyond that is a SIGBUS.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        os.pwrite(file.fileno(), bytes(_NAME_BYTES), 0)
    except OSError:
        return False
    return True


class SharedCounters:
    """Counters in shared memory: each rank increases its own, and waits for those of the others. A collective.

    Args:
        memory: begins with the counters, which take `size(count)` bytes.
        count: number of counters per rank.
    """

    def __init__(self, memory: SharedMemory, *, count: int, timeout_seconds: float) -> None:
        self._rank, self._world_size, self._timeout = collectives.rank(), collectives.world_size(), timeout_seconds
        has_own_cpus = self._world_size * torch.get_num_threads() <= available_cpus()
        self._spins = _SPINS if has_own_cpus else 0  # a spinning rank would keep a late one from its CPU
        numbers = np.frombuffer(memory.bytes, np.int64, count=self.size(count) // 8)
        self._values = numbers.reshape(count, self._world_size, _CACHE_LINE // 8)[:, :, 0]
        self._fence = threading.Lock()
        self._memory = memory
        self._processes: list[str] = collectives.gather_objects(f"process {os.getpid()} on {host()}")

    @staticmethod
    def size(count: int) -> int:
        """Return the number of bytes for `count` counters per rank."""
        return count * collectives.world_size() * _CACHE_LINE

    def publish(self, index: int, value: int) -> None:
        """Set this rank's counter. A rank that has waited for the value sees all earlier writes of this rank."""
        self._order_memory()
        self._values[index, self._rank] = value

    def wait(self, index: int, value: int) -> None:
        """Block until the counter of every rank has reached `value`.

        Raises:
            RuntimeError: a rank has died or timed out.
        """
        values = self._values[index]
        for rank in range(self._world_size):
            if values[rank] < value:
                self._wait_for(values, rank, value)
        self._order_memory()

    def _order_memory(self) -> None:
        """Keep reads and writes before this call before those after it, on processors that reorder them (x86 does not).

        Taking a lock once lets both move into it; the second time cannot move before the first one's release.
        """
        for _ in range(2):
            with self._fence:
                pass

    def _wait_for(self, values: "np.ndarray[tuple[int], np.dtype[np.int64]]", rank: int, value: int) -> None:
        """Spin, then yield the processor, then sleep."""
        for _ in range(self._spins):
            if values[rank] >= value:
                return
        start = checked_at = time.monotonic()
        while values[rank] < value:
            now = time.monotonic()
            if now - start < _YIELD_SECONDS:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_SECONDS)
            if now - checked_at > _CHECK_SECONDS:
                checked_at = now
                if not self._memory.is_alive(rank):
                    raise RuntimeError(f"connection closed by peer: rank {rank}, {self._processes[rank]}, has died")
                if now - start > self._timeout:
                    raise RuntimeError(f"timed out waiting {self._timeout:.0f} s for rank {rank}")


def row_bytes(length: int, dtype: torch.dtype) -> int:
    """Return the bytes of a row of numbers, rounded up to a cache line, so that every row starts on one."""
    return -(-length * dtype.itemsize // _CACHE_LINE) * _CACHE_LINE


def tensor_in(memory: SharedMemory, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor view of the memory. The memory stays mapped while the tensor exists."""
    return torch.frombuffer(memory.bytes, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
