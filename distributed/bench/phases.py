"""Splits the time of training steps into computing, exchanging and waiting, from outside: the product has no hooks for it.

Functions that exchange or wait are replaced by ones that read the clocks, at about two microseconds a call.
"""

import functools
import pkgutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

EXCHANGES = (
    "distributed.comm.all_gather:SharedMemoryAllGather.__call__",
    "distributed.comm.all_gather:process_group_all_gather",
    *(f"distributed.comm.delayed_max:{name}Max.exchange" for name in ("Local", "SharedMemory", "ProcessGroup")),
    *(f"distributed.comm.delayed_max:{name}Max.drain" for name in ("Local", "SharedMemory", "ProcessGroup")),
    "distributed.engine.ddp:BucketSums.hook",
    "distributed.engine.shared_gradients:SharedGradients.sum",
    *(f"distributed.exact.bucket_reduce:SharedMemoryReduce.{name}" for name in ("start", "reduce", "wait")),
    *(f"distributed.exact.bucket_reduce:ReduceScatter.{name}" for name in ("start", "reduce", "wait")),
    "distributed.exact.bucket_reduce:AllReduce.wait",
)
"""Functions that pass data to other ranks or read it from them."""
WAITS = ("distributed.comm.shared_memory:SharedCounters.wait",)
"""Functions that poll for other ranks. Their CPU time is waiting, too."""


class StepTimes(NamedTuple):
    """The times of one step of this process, in seconds.

    Attributes:
        wall: from step to step.
        compute, exchange: CPU time of the main thread, apart from polling.
        other_threads: CPU time of all other threads, e.g. gloo's.
        no_core: time in which the main thread was ready to run, but had no core; 0 where Linux does not count it.
    """

    wall: float
    compute: float
    exchange: float
    other_threads: float
    no_core: float

    @property
    def waiting(self) -> float:
        """The rest: polling, blocked, or without a core."""
        return self.wall - self.compute - self.exchange


class PhaseClock:
    """Measures the phases of each step on the thread that creates it."""

    def __init__(self) -> None:
        self.steps: list[StepTimes] = []
        self._thread = threading.get_ident()
        self._phase = "compute"
        self._cpu = dict.fromkeys(("compute", "exchange", "wait"), 0.0)
        self._mark = time.thread_time()
        self._before: tuple[float, ...] | None = None

    def watch(self, function: str, phase: str) -> None:
        """Charge the CPU time of `MODULE:NAME` or `MODULE:CLASS.NAME`, called by anybody, to `phase`."""
        owner_name, _, name = function.rpartition("." if "." in function.partition(":")[2] else ":")
        owner = pkgutil.resolve_name(owner_name)
        original: Callable[..., Any] = vars(owner)[name]

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            outer = self._enter(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self._enter(outer)

        setattr(owner, name, watched)

    def _enter(self, phase: str) -> str:
        """Charge the time since the last call to the current phase, and return that phase."""
        now = time.thread_time()
        self._cpu[self._phase] += now - self._mark
        self._mark, outer, self._phase = now, self._phase, phase
        return outer

    def end_step(self) -> None:
        """Record the step that ends now. The first call only begins one."""
        self._enter(self._phase)
        main = sum(self._cpu.values())
        now = (time.monotonic(), self._cpu["compute"], self._cpu["exchange"], time.process_time() - main, _no_core())
        if self._before:
            self.steps.append(StepTimes(*[after - before for after, before in zip(now, self._before, strict=True)]))
        self._before = now


def typical_step(steps: Sequence[StepTimes]) -> StepTimes:
    """Return the mean of the middle half of the steps by wall time, without the first quarter (warm-up)."""
    measured = sorted(steps[len(steps) // 4 :])
    middle = measured[len(measured) // 4 : len(measured) - len(measured) // 4]
    return StepTimes(*[sum(values) / len(middle) for values in zip(*middle, strict=True)])


def _no_core() -> float:
    """Return how many seconds this thread has waited for a core."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0
