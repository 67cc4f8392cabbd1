"""Times repeated calls, with CUDA events or with the host's clock."""

import time
from collections.abc import Callable
from statistics import fmean, median

import torch

from distributed.gpu_check.checks import Checks


def device_seconds(call: Callable[[], object], checks: Checks, *, repeats: int, calls: int = 1) -> float:
    """Return seconds per call: the median over `repeats` blocks of `calls`, after one warm-up block.

    On CUDA a block is timed by events, from when the device starts it to when the device finishes it.
    """
    found = [_block(call, checks, calls) for _ in range(1 + repeats)]
    return median(found[1:]) / calls


def _block(call: Callable[[], object], checks: Checks, calls: int) -> float:
    checks.synchronize()
    if not checks.is_cuda:
        return _on_host(call, checks, calls)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1000


def host_seconds(call: Callable[[], object], checks: Checks, *, repeats: int, calls: int = 1) -> float:
    """Return seconds per call by the host's clock: the mean over `repeats` blocks of `calls`, after one warm-up block.

    The host synchronizes with the device before and after each block.
    """
    found = [_on_host(call, checks, calls) for _ in range(1 + repeats)]
    return fmean(found[1:]) / calls


def _on_host(call: Callable[[], object], checks: Checks, calls: int) -> float:
    checks.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    checks.synchronize()
    return time.perf_counter() - start
