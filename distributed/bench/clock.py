"""A clock for training steps that does not slow down what it measures."""

import math
import time

import torch


class StepClock:
    """Reads the time after each block of steps, on CUDA once the device has finished them.

    Kernels are launched ahead of the device. Waiting after every step would charge that to the code under test, never
    waiting would time the launches alone.

    Args:
        steps: number of steps to measure.
        block: steps between two readings.
        until: stop early, after four readings or more, once CLOCK_MONOTONIC has passed this many seconds.
    """

    def __init__(self, device: str, steps: int, *, block: int = 1, until: float = math.inf) -> None:
        self.device, self.steps, self.block, self.until = device, steps, block, until
        self.readings: list[tuple[int, float]] = []
        self._done = 0

    def tick(self) -> bool:
        """Count a finished step; whether enough was measured."""
        if self.finished:
            return True
        self._done += 1
        if self._done % self.block == 0 or self._done == self.steps:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.readings.append((self._done, time.monotonic()))
        return self.finished

    @property
    def finished(self) -> bool:
        if not self.readings:
            return False
        step, now = self.readings[-1]
        return step >= self.steps or (now > self.until and len(self.readings) >= 4)
