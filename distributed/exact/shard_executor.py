"""Runs the shards of a rank on a few worker threads, with barriers where a sum over the entire batch is needed.

A shard passes through the model alone, in single-threaded kernels, so its results do not depend on the number of processes or
cores. Each worker runs several shards, each in a greenlet: at a synchronization point a shard yields and its worker resumes
the next one. A greenlet switch costs about 1 us, a thread switch about 100.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, Self, TypeVar

import greenlet
import torch
from torch import Tensor

from distributed.comm.reduction_tree import shard_range
from distributed.exact.streams import ShardStreams

T = TypeVar("T")
Gather = Callable[[list[Tensor]], Tensor]
"""Takes one row per shard of this rank and returns those of all shards of all ranks, [shards, length]."""


class _ThreadModes(NamedTuple):
    """Settings that torch keeps per thread, and that the shards of one thread must not share."""

    grad: bool
    autocast: bool
    autocast_cache: bool
    autocast_dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> Self:
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device_type),
            torch.is_autocast_cache_enabled(),
            torch.get_autocast_dtype(device_type),
        )

    def set(self, device_type: str) -> None:
        torch._C._set_grad_enabled(self.grad)
        torch.set_autocast_enabled(device_type, self.autocast)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_autocast_dtype(device_type, self.autocast_dtype)


class _Shard(greenlet.greenlet):
    """A coroutine that computes one of this rank's shards."""

    def __init__(self, compute: Callable[[int], Any], index: int, modes: _ThreadModes) -> None:
        super().__init__(compute)
        self.index, self.worker_modes = index, modes


class ShardExecutor:
    """Runs a function for every shard of this rank. The calling thread is one of the workers.

    Args:
        workers: maximum number of shards that compute at the same time.
        gather: communication with the other ranks; called once per synchronization point, by any of the workers.
        own_streams: on CUDA, run each shard on its own stream; requires a single worker.
    """

    def __init__(
        self, shards: int, *, workers: int, gather: Gather, device: torch.device, own_streams: bool = False
    ) -> None:
        workers = min(workers, shards)
        self._streams = ShardStreams(shards if own_streams and workers == 1 else 0, device)
        self._gather, self._device = gather, device
        self._shards_of_worker = [shard_range(worker, workers, shards) for worker in range(workers)]
        self._threads = ThreadPoolExecutor(max(1, workers - 1), "shard-worker", initialize_thread, (device,))
        self._rows: list[Tensor] = [torch.empty(0)] * shards
        self._reduce_fn: Callable[[Tensor], Any] | None = None
        self._result: Any = None
        self._barrier = threading.Barrier(workers, self._gather_and_reduce)

    def run(self, compute: Callable[[int], T]) -> list[T]:
        """Return `compute(shard)` for every shard. All shards must reach the same number of synchronization points.

        Raises:
            Exception: raised by a shard; the other shards are abandoned.
        """
        results: dict[int, T] = {}
        others = [self._threads.submit(self._run_shards, own, compute, results) for own in self._shards_of_worker[1:]]
        failures: list[BaseException] = []
        try:
            self._run_shards(self._shards_of_worker[0], compute, results)
        except BaseException as error:
            failures.append(error)
        failures += [failed for other in others if (failed := other.exception()) is not None]
        if failures:
            self._barrier.reset()
            raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
        return [results[shard] for shard in sorted(results)]

    def all_gather_rows(self, row: Tensor, reduce_fn: Callable[[Tensor], T]) -> T:
        """Synchronize all shards. Return `reduce_fn` of all shards' rows, computed once and shared by all of them.

        To be called by every shard, with its row, from inside `run`.
        """
        shard = greenlet.getcurrent()
        assert isinstance(shard, _Shard), "called outside of `run`"
        self._rows[shard.index], self._reduce_fn = row, reduce_fn
        device_type, worker = self._device.type, shard.parent
        assert worker is not None
        modes = _ThreadModes.current(device_type)
        shard.worker_modes.set(device_type)
        worker.switch()
        modes.set(device_type)
        result: T = self._result
        return result

    def _run_shards(self, shards: range, compute: Callable[[int], T], results: dict[int, T]) -> None:
        """Run this worker's shards from one synchronization point to the next until all have returned."""
        modes = _ThreadModes.current(self._device.type)
        running = [_Shard(compute, shard, modes) for shard in shards]
        try:
            arguments: dict[int, tuple[int, ...]] = {shard: (shard,) for shard in shards}
            while running:
                synchronizing = []
                self._streams.fork()
                for shard in running:
                    with self._streams.use(shard.index):
                        result = shard.switch(*arguments.pop(shard.index, ()))
                    if shard.dead:
                        results[shard.index] = result
                    else:
                        synchronizing.append(shard)
                self._streams.join()
                if synchronizing:
                    self._barrier.wait()
                running = synchronizing[::-1]  # the shard whose data is still in the cache resumes first
        except BaseException:
            self._barrier.abort()
            for shard in running:
                with suppress(BaseException):
                    shard.throw()  # in its own thread, so that it leaves its context managers
            raise

    def _gather_and_reduce(self) -> None:
        assert self._reduce_fn is not None
        self._result, self._reduce_fn = self._reduce_fn(self._gather(self._rows)), None


def initialize_thread(device: torch.device) -> None:
    """Make the current thread compute alone and on this device. OpenMP keeps its number of threads per thread."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
