"""The time of a function on the device."""

import time
from collections.abc import Callable

from distributed.gpu_check.checks import Checks


def milliseconds(checks: Checks, function: Callable[[], object], *, repeats: int = 50) -> float:
    """The mean time of a call over `repeats`, in ms, after a few that are not counted; the host waits once, at the end."""
    repeats = 3 if checks.tiny else repeats
    for _ in range(3):
        function()
    checks.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    checks.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3
