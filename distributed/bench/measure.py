"""Times training steps without slowing them down. Imports torch only to synchronize with a GPU."""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

Readings = list[tuple[int, float]]
"""The clock's readings: (steps done, CLOCK_MONOTONIC in seconds)."""


class StepClock:
    """Reads the time after each block of steps; on CUDA once the device has finished them.

    Kernels are launched ahead of the device. Synchronizing after every step would charge that wait to the code being
    measured; never synchronizing would time only the launches.

    Args:
        steps: number of steps to measure.
        block: steps between two readings.
        until: CLOCK_MONOTONIC in seconds after which to stop early, once there are four readings.

    `on_step` is called after each step that is measured.
    """

    def __init__(self, device: str, steps: int, *, block: int = 1, until: float = math.inf) -> None:
        self.device, self.steps, self.block, self.until = device, steps, block, until
        self.readings: Readings = []
        self.on_step: Callable[[], object] = lambda: None
        self._done = 0
        self._synchronize: Callable[[], object] = lambda: None
        if device == "cuda":
            import torch

            self._synchronize = torch.cuda.synchronize

    def tick(self) -> bool:
        """Count a finished step. Return whether the measurement is complete."""
        if self.finished:
            return True
        self._done += 1
        self.on_step()
        if self._done % self.block == 0 or self._done == self.steps:
            self._synchronize()
            self.readings.append((self._done, time.monotonic()))
        return self.finished

    @property
    def finished(self) -> bool:
        if not self.readings:
            return False
        step, now = self.readings[-1]
        return step >= self.steps or (now > self.until and len(self.readings) >= 4)


def step_seconds(readings: Readings) -> list[float]:
    """Return the mean step time of each block, in seconds, without the first quarter of the readings (warm-up)."""
    measured = readings[len(readings) // 4 :]
    return [(after - before) / (last - first) for (first, before), (last, after) in pairwise(measured)]


def typical_step_seconds(readings: Readings, device: str) -> float:
    """Return the median of `step_seconds`; on CUDA their mean.

    There one step in many augments the images of all, and a median would leave it out.
    """
    return mean_step_seconds(readings) if device == "cuda" else statistics.median(step_seconds(readings))


def mean_step_seconds(readings: Readings) -> float:
    """Return the mean step time in seconds, without the first eighth of the readings (warm-up)."""
    (first, start), (last, end) = readings[len(readings) // 8], readings[-1]
    return (end - start) / (last - first)
