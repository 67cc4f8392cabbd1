"""What a run has to tell, and how it is measured. Where it is told is a `Sink`'s part."""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class TrainMetrics:
    """Means over the steps since the last logging step, over all ranks."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    images_per_second: float
    data_wait: float  # part of the time spent waiting for batches
    memory_mib: float  # the most that this rank held: of its GPU's memory, or resident
    eta_seconds: float
    skipped_steps: int = 0  # of these steps, in float16: a gradient overflowed, so that the weights stayed as they were


@dataclass(frozen=True)
class SplitMetrics:
    """One split at the end of an epoch."""

    loss: float
    accuracy: float
    accuracy5: float


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
    """Where metrics are announced; every rank calls its sinks with the same numbers at the same steps."""

    def train(self, metrics: TrainMetrics) -> None: ...

    def epoch(self, metrics: EpochMetrics) -> None: ...

    def close(self) -> None: ...


class Meter:
    """Images a second and the wait for data, between two readings."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading: an evaluation, say."""
        self._start, self._waited = time.perf_counter(), 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same items, the time that each took to come counted."""
        while True:
            asked = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield item

    def read(self) -> tuple[float, float]:
        """(seconds since the last reading, part of them spent waiting for data)."""
        seconds = time.perf_counter() - self._start
        waited = self._waited
        self.restart()
        return seconds, waited / seconds


def memory_mib(device: torch.device) -> float:
    """The most memory this process held so far: on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
