"""A workload of a benchmark, which is run and measured in a process of its own."""

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distributed.bench.measure import Readings
from distributed.process.session import run_in_session
from distributed.process.torchrun import torchrun_command


class Measurement(NamedTuple):
    """The measurement of one workload.

    Attributes:
        start: CLOCK_MONOTONIC, in seconds, at which the process was started.
        readings: the readings of its step clock.
        memory_mib: rank 0's peak memory in MiB.
        figures: what its function returned, one entry per rank in any order.
    """

    start: float
    readings: Readings
    memory_mib: float
    figures: list[dict[str, Any]] = []  # noqa: RUF012 (never changed)


class WorkloadFailedError(RuntimeError):
    """A workload failed or took too long. The message is one line; `output` is the end of the workload's output."""

    def __init__(self, line: str, output: str = "") -> None:
        super().__init__(line)
        self.output = output


@dataclass(frozen=True)
class Workload:
    """A function of `distributed/bench/workloads/` and how to run it.

    Args:
        function: MODULE:FUNCTION, called with a StepClock and `settings`.
        settings: its keyword arguments, as JSON values.
        steps: number of steps to measure.
        block: steps between two readings of the clock.
        batch: mean number of images per step.
        ranks: processes, started by torchrun; 0: one process without torchrun.
        python: the interpreter that runs it.
    """

    function: str
    settings: Mapping[str, Any]
    steps: int
    device: str = "cpu"
    block: int = 1
    batch: float = 128
    ranks: int = 0
    python: Path = Path(sys.executable)

    def measure_until(self, deadline: float, seconds: float | None) -> Measurement:
        """Measure within `seconds`, if given, and before the time limit of the benchmark.

        Args:
            deadline: CLOCK_MONOTONIC in seconds at which the workload is killed, or not even started.

        Raises:
            WorkloadFailedError: as in `measure`, or the benchmark's time limit was reached.
        """
        limit = min(seconds or math.inf, deadline - time.monotonic())
        if limit <= 0:
            raise WorkloadFailedError("not started: the time limit --minutes is reached")
        try:
            return self.measure(None if limit == math.inf else limit)
        except WorkloadFailedError as error:
            if str(error).startswith("timed out") and time.monotonic() >= deadline:
                raise WorkloadFailedError("ended by the time limit --minutes", error.output) from None
            raise

    def measure(self, seconds: float | None = None) -> Measurement:
        """Run the workload in a process of its own.

        Args:
            seconds: time limit; measuring stops after three quarters of it.

        Raises:
            WorkloadFailedError: the workload failed or reached the time limit.
        """
        start = time.monotonic()
        clock: dict[str, Any] = {"device": self.device, "steps": self.steps, "block": self.block}
        if seconds is not None:
            clock["until"] = start + 0.75 * seconds
        module, arguments = (
            "distributed.bench.worker",
            [self.function, json.dumps({"clock": clock, "settings": self.settings})],
        )
        command = [str(self.python), "-m", module, *arguments]
        if self.ranks:
            command = torchrun_command(self.ranks, module, arguments)
        code, printed, errors = run(command, seconds)
        lines = [line for line in printed.splitlines() if line.startswith("CLOCK ")]
        if lines and code in (0, None):  # the figures are complete even if the process hung after printing them
            readings, memory_mib = json.loads(lines[0].removeprefix("CLOCK "))
            figures = [json.loads(line[8:]) for line in printed.splitlines() if line.startswith("FIGURES ")]
            return Measurement(start, [(step, at) for step, at in readings], memory_mib, figures)
        if code is None:
            raise WorkloadFailedError(f"timed out after {seconds:.0f} s", printed[-1000:] + errors[-3000:])
        raise WorkloadFailedError(_error_line(errors) or f"exit code {code}", printed[-1000:] + errors[-3000:])


class Completed(NamedTuple):
    """Exit code (None: timed out), stdout and stderr of a process."""

    code: int | None
    printed: str
    errors: str


def run(command: list[str], seconds: float | None = None) -> Completed:
    """Run `command` to its end or for at most `seconds`, and end every process it started."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        with stdout.open("wb") as printed, stderr.open("wb") as errors:
            code = run_in_session(command, seconds, stdout=printed, stderr=errors)
        return Completed(code, stdout.read_text(errors="replace"), stderr.read_text(errors="replace"))


def _error_line(errors: str) -> str:
    """Return the last line that names an exception of a rank, since torchrun prints more after it; else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and "ChildFailedError" not in line]
    raised = [line for line in lines if re.match(r"(\[\w+\]:\s*)?[\w.]+(Error|Exception|Interrupt)\b", line)]
    return next(reversed(raised or lines), "")
