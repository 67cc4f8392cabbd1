"""Times the training of each epoch and leaves out what happens between epochs. Imports no torch unless on a GPU."""

import time
from typing import Any


class EpochClock:
    """The training time so far, and the curve of test accuracy over it.

    `start` begins an epoch, `step` follows each of its steps, and `end_epoch` adds the time between `start` and the last
    `step`. On CUDA both are events on the device's own timeline, so no step waits for the device.

    Attributes:
        curve: seconds of training and test accuracy, after each epoch.
    """

    def __init__(self, device: str) -> None:
        self.curve: list[tuple[float, float]] = []
        self._on_device = device == "cuda"
        self._seconds = 0.0
        self._started: Any = None  # a reading now would make every rank use the first GPU
        self._stepped: Any = None

    def start(self) -> None:
        """Begin to measure an epoch."""
        self._started = self._stepped = self._now()

    def step(self) -> None:
        """Note the end of a step."""
        self._stepped = self._now()

    def end_epoch(self, accuracy: float) -> None:
        """Add the time of the epoch up to its last step, and note the test accuracy after it."""
        self._seconds += self._between(self._started, self._stepped)
        self.curve.append((self._seconds, accuracy))

    def _now(self) -> Any:
        if not self._on_device:
            return time.monotonic()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        if not self._on_device:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000
