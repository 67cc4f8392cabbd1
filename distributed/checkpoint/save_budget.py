"""Limits the time spent on saves: on a fast GPU an epoch can take less time than writing its checkpoint."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SaveBudget:
    """Limits end-of-epoch saves to a fraction of the time since the attempt began.

    Args:
        fraction: in (0, 1]; 1 allows every save.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, fraction: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._fraction, self._clock = fraction, clock
        self._began, self._spent, self._last = clock(), 0.0, 0.0

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the duration of a save, in any thread."""
        start = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - start
            self._spent += self._last

    @property
    def unlimited(self) -> bool:
        """Whether every save is allowed, even one that has to wait for the previous save."""
        return self._fraction == 1

    def allows(self) -> bool:
        """Whether another save as long as the last one stays within the fraction."""
        return self.unlimited or self._spent + self._last <= self._fraction * (self._clock() - self._began)
