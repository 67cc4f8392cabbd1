"""The metrics of a run, how they are measured, and the `Sink` protocol of their destinations."""

import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class TrainMetrics:
    """Means over the steps since the last logging step or the beginning of the epoch, over all ranks."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    images_per_second: float
    data_wait: float  # fraction of the time spent waiting for batches
    memory_mib: float  # this rank's peak: allocated on its GPU, or resident on the CPU
    eta_seconds: float
    skipped_steps: int = 0  # in float16: steps whose gradient overflowed, so that the weights were not updated


@dataclass(frozen=True)
class SplitMetrics:
    """One split at the end of an epoch."""

    loss: float
    accuracy: float
    accuracy5: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # of `evaluation.metrics`, by name


@dataclass(frozen=True)
class EpochMetrics:
    """The end of an epoch: means over its training steps, and the evaluated splits."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    validation: SplitMetrics | None
    test: SplitMetrics | None
    is_best: bool
    seconds: float


class Sink(Protocol):
    """A destination of metrics. `train` calls it on rank 0.

    With a class attribute `on_every_rank = True`, every rank calls its own at the same steps, e.g. because a cluster's reports
    are a barrier of all ranks. The numbers are the same, except for times, speeds and memory, which are the rank's own.
    """

    def log_step(self, metrics: TrainMetrics) -> None: ...

    def log_epoch(self, metrics: EpochMetrics) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class LearnsStart(Protocol):
    """A sink that receives the first step of an attempt, before its first metrics."""

    def begin(self, step: int) -> None:
        """Metrics of later steps follow; a killed attempt may have logged some of them already."""
        ...


@runtime_checkable
class LearnsEnding(Protocol):
    """A sink that receives the final status of the run, before it is closed."""

    def end(self, status: Literal["finished", "stopped", "failed"]) -> None: ...


class Elapsed(NamedTuple):
    """The time between two readings of a `SpeedMeter`."""

    seconds: float
    data_wait: float
    """Fraction of the seconds spent waiting for data."""


class SpeedMeter:
    """Measures elapsed time and the wait for data between two readings."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Discard the time since the last reading, e.g. that of an evaluation."""
        self._start, self._waited = time.perf_counter(), 0.0

    def time_waits(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the items unchanged and measure how long each one took to arrive."""
        while True:
            start = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield item

    def read(self) -> Elapsed:
        """Return the time since the last reading and restart."""
        seconds = time.perf_counter() - self._start
        waited = self._waited
        self.restart()
        return Elapsed(seconds, waited / seconds)


def peak_memory_mib(device: torch.device) -> float:
    """Return this process's peak memory so far: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
