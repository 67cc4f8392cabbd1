"""Profiles some steps with torch's profiler: tables to read, counts of launches and waits to record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from distributed.gpu_check.checks import Checks

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile(step: Callable[[], object], checks: Checks, *, steps: int, title: str, file: Path) -> dict[str, float]:
    """Profile `steps` calls, and append tables sorted by device and by host time to the file.

    Returns:
        On CUDA, per step: kernel launches, copies, waits for the device, and milliseconds of device time.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if checks.is_cuda else [])]
    checks.synchronize()
    with torch_profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        checks.synchronize()
    averages = profiler.key_averages()
    orders = ["self_cpu_time_total", *(["self_device_time_total"] if checks.is_cuda else [])]
    tables = [averages.table(sort_by=order, row_limit=60, max_name_column_width=80) for order in reversed(orders)]
    with file.open("a") as out:
        for order, text in zip(reversed(orders), tables, strict=True):
            out.write(f"{title}: {steps} steps, by {order}\n{text}\n\n")
    if not checks.is_cuda:
        return {}

    def calls(*prefixes: str) -> float:
        return float(sum(row.count for row in averages if row.key.startswith(prefixes))) / steps

    return {
        "kernel_launches_per_step": calls(*_LAUNCHES),
        "copies_and_fills_per_step": calls("cudaMemcpyAsync", "cudaMemsetAsync"),
        "waits_per_step": calls(*_WAITS),
        "ms_of_device_time_per_step": _device_microseconds(averages) / steps / 1000,
    }


def _device_microseconds(averages: Any) -> float:
    """Return the device time of all kernels, copies and fills."""
    return float(sum(row.self_device_time_total for row in averages if str(row.device_type).endswith("CUDA")))
