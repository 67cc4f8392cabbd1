"""Runs contenders in interleaved rounds and sets their figures side by side."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from distributed.topology import processor
from distributed.versions import git_state, versions


class Measured(NamedTuple):
    """When a contender was started, the clock after each of its steps, and the most memory rank 0 held."""

    start: float
    clock: list[float]
    memory_mib: float


@dataclass(frozen=True)
class Contender:
    """A function of `distributed.bench.contenders` with its arguments, on so many torchrun ranks (0: plain python)."""

    function: str
    arguments: Mapping[str, Any]
    ranks: int = 0

    def measure(self) -> Measured:
        """Run it in a process of its own.

        Raises:
            RuntimeError: it failed, with the end of what it printed.
        """
        launcher = (
            ["-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}", "--standalone"] if self.ranks else []
        )
        command = [
            sys.executable,
            *launcher,
            "-m",
            "distributed.bench.contenders",
            self.function,
            json.dumps(self.arguments),
        ]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("CLOCK ")]
        if done.returncode or not lines:
            raise RuntimeError(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
            )
        clock, memory_mib = json.loads(lines[0].removeprefix("CLOCK "))
        return Measured(start, clock, memory_mib)


def median_step_seconds(clock: list[float], *, skip: int) -> float:
    """The median time of a step, the first few left out."""
    return statistics.median(after - before for before, after in zip(clock[skip:], clock[skip + 1 :], strict=False))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "versions": versions(),
        "git": git_state(),
    }
