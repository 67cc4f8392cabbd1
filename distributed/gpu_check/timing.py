"""Median times of repeated calls, by CUDA events on a GPU and by the host's clock elsewhere."""

import time
from collections.abc import Callable
from statistics import median

import torch

from distributed.gpu_check.checks import Checks


def device_seconds(call: Callable[[], object], checks: Checks, *, repeats: int, calls: int = 1) -> float:
    """Seconds a call: the median over `repeats` blocks of `calls`, after one block that does not count.

    On CUDA a block is timed by events: from when the device reaches it to when the device is through it.
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
    """Seconds a call by the host's clock, the device waited for at both ends of a block of `calls`: the median over
    `repeats` blocks, after one that does not count."""
    found = [_on_host(call, checks, calls) for _ in range(1 + repeats)]
    return median(found[1:]) / calls


def _on_host(call: Callable[[], object], checks: Checks, calls: int) -> float:
    checks.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    checks.synchronize()
    return time.perf_counter() - start


def milliseconds(checks: Checks, call: Callable[[], object]) -> float:
    """Milliseconds a call: the mean of some dozen, after a few that do not count; the host waits once, at the end."""
    for _ in range(3):
        call()
    return _on_host(call, checks, repeats := 3 if checks.tiny else 50) / repeats * 1e3
