"""How much slower this machine is than the one on which the time limits were set: `python tests/kit/speed.py` prints it."""

import functools
import time

_REFERENCE_SECONDS = 0.11  # on one core of a quiet AMD EPYC (Zen 3)
_MOST = 6.0


@functools.cache
def slowness() -> float:
    """1.0 or more: the factor for time limits, from a short loop, best of three."""
    return min(_MOST, max(1.0, min(_loop() for _ in range(3)) / _REFERENCE_SECONDS))


def _loop() -> float:
    begin, x = time.perf_counter(), 0
    for i in range(2_000_000):
        x = (x * 1103515245 + i) & 0xFFFFFFFF
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(f"{slowness():.2f}")
