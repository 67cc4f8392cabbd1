"""Runs contenders, each in a process of its own, and says on what machine."""

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from distributed.host.cpu_quota import available_cpus
from distributed.host.hardware import processor
from distributed.host.versions import git_state, versions
from distributed.process.torchrun import torchrun_command

PEERS = ("timm", "pytorch-lightning", "lightning")  # as their packages are called
Readings = list[tuple[int, float]]


class Measured(NamedTuple):
    """When a contender was started, its clock's readings as (steps done, seconds), and the most memory rank 0 held."""

    start: float
    readings: Readings
    memory_mib: float


class ContenderFailedError(RuntimeError):
    """A contender failed or took too long; the message is one line, `output` the end of what it printed."""

    def __init__(self, line: str, output: str = "") -> None:
        super().__init__(line)
        self.output = output


@dataclass(frozen=True)
class Contender:
    """A function that is given a StepClock and `settings`, on `ranks` torchrun ranks (0: plain python).

    Args:
        function: MODULE:FUNCTION.
        steps, block: number of steps, and steps between two readings of the clock.
        batch: images a step.
    """

    function: str
    settings: Mapping[str, Any]
    steps: int
    device: str = "cpu"
    block: int = 1
    batch: int = 128
    ranks: int = 0

    def measure(self, seconds: float | None = None) -> Measured:
        """Run it in a process of its own, which stops measuring after three quarters of the `seconds` it may take.

        Raises:
            ContenderFailedError: it failed, or it was ended after `seconds`.
        """
        start = time.monotonic()
        clock: dict[str, Any] = {"device": self.device, "steps": self.steps, "block": self.block}
        if seconds is not None:
            clock["until"] = start + 0.75 * seconds
        module = "distributed.bench.contenders"
        arguments = [self.function, json.dumps({"clock": clock, "settings": self.settings})]
        plain = [sys.executable, "-m", module, *arguments]
        command = torchrun_command(self.ranks, module, arguments) if self.ranks else plain
        code, printed, errors = _run(command, seconds)
        lines = [line for line in printed.splitlines() if line.startswith("CLOCK ")]
        if lines and code in (0, None):  # whatever holds it up after its figures
            readings, memory_mib = json.loads(lines[0].removeprefix("CLOCK "))
            return Measured(start, [(step, at) for step, at in readings], memory_mib)
        if code is None:
            raise ContenderFailedError(f"timed out after {seconds:.0f} s", printed[-1000:] + errors[-3000:])
        raise ContenderFailedError(_last_line(errors) or f"exit code {code}", printed[-1000:] + errors[-3000:])


def _run(command: list[str], seconds: float | None) -> tuple[int | None, str, str]:
    """Exit code, None out of time, and what it printed to stdout and stderr; whatever it started is ended with it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "stdout", Path(folder) / "stderr"
        with paths[0].open("wb") as printed, paths[1].open("wb") as errors:
            # A session of its own, so that ranks and loader workers can be ended too.
            process = subprocess.Popen(command, stdout=printed, stderr=errors, start_new_session=True)
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        return code, paths[0].read_text(errors="replace"), paths[1].read_text(errors="replace")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End it and its process group: asked first, since torchrun's ranks have sessions of their own and only it knows them."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(errors: str) -> str:
    """The last line of a traceback if there is one: torchrun prints more after it. Else the very last."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"(\[\w+\]:\s*)?[\w.]+(Error|Exception|Interrupt)\b", line)]
    return next(reversed(raised or lines), "")


def step_seconds(readings: Readings) -> list[float]:
    """The time of a step in each block; the first quarter of the readings is left out as warm-up."""
    kept = readings[len(readings) // 4 :]
    return [(after - before) / (last - first) for (first, before), (last, after) in pairwise(kept)]


def median_step_seconds(readings: Readings) -> float:
    """The median of `step_seconds`."""
    return statistics.median(step_seconds(readings))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on: processor and versions; on CUDA the card, its driver and cuDNN too."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": available_cpus(),
        "system": platform.system(),
        "versions": {**versions(), **_peers()},
        "git": git_state(),
    }
    return found | ({"gpu": _gpu()} if device == "cuda" else {})


def _peers() -> dict[str, str]:
    found = {}
    for package in PEERS:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _gpu() -> dict[str, Any]:
    """The first card. nvidia-smi is asked for the driver, which torch does not know."""
    import torch

    card = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    driver = clock = "unknown"
    with suppress(OSError, subprocess.TimeoutExpired, ValueError):
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
        driver, clock = (word.strip() for word in said.strip().split(","))
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
