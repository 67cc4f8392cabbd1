"""Describes the machine a measurement ran on. Imports torch only to describe a GPU."""

import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from distributed.bench.peers import installed_versions
from distributed.host.cpu_quota import available_cpus
from distributed.host.hardware import instructions, processor, processor_model
from distributed.host.versions import git_state, versions


def machine(device: str = "cpu", *, peer_python: Path = Path(sys.executable)) -> dict[str, Any]:
    """Return the processor and the versions of all packages involved; for `cuda` also the card, its driver and cuDNN.

    Args:
        peer_python: the Python that runs other frameworks.
    """
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "processor_model": processor_model(),
        "instructions": instructions(),
        "cores": available_cpus(),
        "system": platform.system(),
        "versions": {**versions(), **installed_versions(peer_python)},
        "git": git_state(),
    }
    return found | ({"gpu": _gpu()} if device == "cuda" else {})


def _gpu() -> dict[str, Any]:
    """Describe the first card. The driver's version comes from nvidia-smi, since torch does not know it."""
    import torch

    card = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    driver = clock = "unknown"
    with suppress(OSError, subprocess.TimeoutExpired, ValueError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
        driver, clock = (field.strip() for field in answer.strip().split(","))
    return {
        "card": card.name,
        "count": torch.cuda.device_count(),
        "multiprocessors": card.multi_processor_count,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "driver": driver,
        "highest_clock": clock,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
