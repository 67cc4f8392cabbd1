"""Runs the shards of a rank on a few worker threads, with barriers where a sum over the entire batch is needed.

A shard passes through the model alone, in single-threaded kernels, so its results do not depend on the number of processes or
cores. Each worker runs several shards, each in a greenlet: at a synchronization point a shard yields and its worker resumes
the next one. A greenlet switch costs about 1 us, a thread switch about 100.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self, TypeVar
from weakref import WeakMethod

import greenlet
import torch
from torch import Tensor

from distributed.comm.reduction_tree import shard_range
from distributed.errors import InputError
from distributed.exact.streams import ShardStreams
from distributed.exact.torch_compat import get_backward_group, set_backward_group

_UNEVEN = (
    "a layer that synchronizes, e.g. batch norm, was called for some shards of a batch only; let every batch call it, or set "
    "exact.shards = 0"
)
T = TypeVar("T")
Gather = Callable[[list[Tensor]], Tensor]
"""Takes one row per shard of this rank and returns those of all shards of all ranks, [shards, length]."""


class _ThreadModes(NamedTuple):
    """Settings that torch keeps per thread, and that the shards of one thread must not share."""

    grad: bool
    autocast: bool
    autocast_cache: bool
    autocast_dtype: torch.dtype
    backward_group: Any

    @classmethod
    def current(cls, device_type: str) -> Self:
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device_type),
            torch.is_autocast_cache_enabled(),
            torch.get_autocast_dtype(device_type),
            get_backward_group(),
        )

    def set(self, device_type: str) -> None:
        torch._C._set_grad_enabled(self.grad)
        torch.set_autocast_enabled(device_type, self.autocast)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_autocast_dtype(device_type, self.autocast_dtype)
        set_backward_group(self.backward_group)


class _Unit(greenlet.greenlet):
    """A coroutine that computes one of this rank's shards, or all shards of a worker as a group."""

    def __init__(self, compute: Callable[[range], Any], shards: range, modes: _ThreadModes) -> None:
        super().__init__(compute)
        self.shards, self.worker_modes = shards, modes


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
        reduce = WeakMethod(self._gather_and_reduce)  # a cycle would keep the model's memory until the next collection
        self._ended = set[int]()  # workers that wait at the barrier after their last shard, by their first one
        self._barrier = threading.Barrier(workers, lambda: _call(reduce))

    @property
    def largest_group(self) -> int:
        """The most shards that one worker has."""
        return max(map(len, self._shards_of_worker))

    def run(self, compute: Callable[[int], T]) -> list[T]:
        """Return `compute(shard)` for every shard.

        Raises:
            InputError: some shards have reached fewer synchronization points than others.
            Exception: raised by a shard; the other shards are abandoned.
        """
        singles = [[range(shard, shard + 1) for shard in own] for own in self._shards_of_worker]
        return self._run(singles, lambda shards: compute(shards.start))

    def run_groups(self, compute: Callable[[range], T]) -> list[T]:
        """Return `compute(shards)` of every worker, which computes its shards as one group; otherwise like `run`."""
        return self._run([[own] for own in self._shards_of_worker], compute)

    def _run(self, units: list[list[range]], compute: Callable[[range], T]) -> list[T]:
        results: dict[int, T] = {}
        others = [self._threads.submit(self._run_units, own, compute, results) for own in units[1:]]
        failures: list[BaseException] = []
        try:
            self._run_units(units[0], compute, results)
        except BaseException as error:
            failures.append(error)
        failures += [failed for other in others if (failed := other.exception()) is not None]
        if failures:
            self._barrier.reset()
            self._ended.clear()
            raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
        return [results[first] for first in sorted(results)]

    def all_gather_rows(self, own_rows: list[Tensor], reduce_fn: Callable[[Tensor], T]) -> T:
        """Synchronize all shards. Return `reduce_fn` of all shards' rows, computed once and shared by all of them.

        To be called by every shard with its row, or by every group with its rows, from inside `run` or `run_groups`.
        """
        unit = greenlet.getcurrent()
        assert isinstance(unit, _Unit), "called outside of `run`"
        assert len(own_rows) == len(unit.shards), "one row per shard"
        self._rows[unit.shards.start : unit.shards.stop] = own_rows
        self._reduce_fn = reduce_fn
        device_type, worker = self._device.type, unit.parent
        assert worker is not None
        modes = _ThreadModes.current(device_type)
        unit.worker_modes.set(device_type)
        worker.switch()
        modes.set(device_type)
        result: T = self._result
        return result

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Synchronize with no other rank: `reduce_fn` gets the rows of this rank only. Context manager."""
        gather, self._gather = self._gather, torch.stack
        try:
            yield
        finally:
            self._gather = gather

    def _run_units(self, units: list[range], compute: Callable[[range], T], results: dict[int, T]) -> None:
        """Run this worker's units from one synchronization point to the next until all have returned."""
        modes = _ThreadModes.current(self._device.type)
        running = [_Unit(compute, shards, modes) for shards in units]
        try:
            arguments: dict[int, tuple[range, ...]] = {shards.start: (shards,) for shards in units}
            while running:
                synchronizing = []
                self._streams.fork()
                for unit in running:
                    first = unit.shards.start
                    with self._streams.use(first):
                        result = unit.switch(*arguments.pop(first, ()))
                    if unit.dead:
                        results[first] = result
                    else:
                        synchronizing.append(unit)
                self._streams.join()
                if synchronizing and len(synchronizing) < len(running):
                    raise InputError(_UNEVEN)
                if synchronizing:
                    self._barrier.wait()
                running = synchronizing[::-1]  # the shard whose data is still in the cache resumes first
            self._ended.add(units[0].start)
            self._barrier.wait()
        except BaseException:
            self._barrier.abort()
            for unit in running:
                with suppress(BaseException):
                    unit.throw()  # in its own thread, so that it leaves its context managers
            raise

    def _gather_and_reduce(self) -> None:
        """Run at the barrier, when all workers wait."""
        if self._ended:
            if len(self._ended) < self._barrier.parties:
                raise InputError(_UNEVEN)
            self._ended.clear()
            return
        assert self._reduce_fn is not None
        self._result, self._reduce_fn = self._reduce_fn(self._gather(self._rows)), None


def _call(method: "WeakMethod[Callable[[], None]]") -> None:
    if found := method():
        found()


def initialize_thread(device: torch.device) -> None:
    """Make the current thread compute alone and on this device. OpenMP keeps its number of threads per thread."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
