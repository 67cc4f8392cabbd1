"""Runs a benchmark's workloads in rounds, and summarizes and writes their figures."""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distributed.bench.benchmarks import Benchmark, Figures
from distributed.bench.options import Options
from distributed.bench.workload import WorkloadFailedError
from distributed.process.optional_output import OptionalOutput
from distributed.process.output_file import write_output


@dataclass
class Results:
    """A benchmark's results so far; all but `outputs` are written as JSON.

    Attributes:
        ratios, failed: one entry per round.
        skipped: workloads that cannot run here, each with the reason.
        model: what was fitted to the figures.
        outputs: output of the workloads that failed.
    """

    command: str
    machine: dict[str, Any]
    rounds: list[Figures] = field(default_factory=list)
    ratios: list[Figures] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    outputs: str = ""

    def write(self, file: Path) -> None:
        """Write the results to `file`, and the output of failed workloads beside it."""
        content = {
            name: value for name, value in asdict(self).items() if name != "outputs" and (value or name != "model")
        }
        write_output(file, (json.dumps(content, indent=1) + "\n").encode())
        if self.outputs:
            write_output(file.with_suffix(".failed.txt"), self.outputs.encode())


def run_rounds(
    benchmark: Benchmark, options: Options, results: Results, *, rounds: int, deadline: float, file: Path | None
) -> None:
    """Add `rounds` rounds to `results`, and write them to `file` after each.

    Args:
        deadline: as in `run_round`.
    """
    for number in range(rounds):
        figures, errors = run_round(benchmark, options, deadline, label=f"round {number + 1}: ")
        results.rounds.append(figures)
        results.ratios.append(benchmark.ratios_of(figures))
        results.failed.append({name: str(error) for name, error in errors.items()})
        results.outputs += "".join(f"{name}: {error}\n{error.output}\n\n" for name, error in errors.items())
        if file:
            with OptionalOutput(file):  # rounds take long: a failed write must not end the benchmark
                results.write(file)


class RoundResult(NamedTuple):
    """The figures of a round, and the errors of the workloads that failed, by name."""

    figures: Figures
    errors: dict[str, WorkloadFailedError]


def run_round(benchmark: Benchmark, options: Options, deadline: float, *, label: str = "") -> RoundResult:
    """Measure each workload once.

    Args:
        deadline: CLOCK_MONOTONIC in seconds at which the running workload is killed and no other is started.
        label: prefix of the lines printed to stderr.
    """
    figures: Figures = {}
    failed: dict[str, WorkloadFailedError] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, workload in benchmark.workloads(options, folder).items():
            start = time.monotonic()
            try:
                new = benchmark.figures_of(name, workload, workload.measure_until(deadline, options.seconds))
            except WorkloadFailedError as error:
                failed[name] = error
                print(f"{label}failed: {name}: {error}", file=sys.stderr, flush=True)
                continue
            figures |= new
            values = ", ".join(
                f"{key.removeprefix(f'{name}, ')}: {value:,.4g}{_unit(key, benchmark)}" for key, value in new.items()
            )
            print(f"{label}{values} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    return RoundResult(figures, failed)


def summary(benchmark: Benchmark, rounds: list[Figures]) -> str:
    """Return a line per figure and per ratio: its median over the rounds, the range of a ratio, and the note of a figure."""
    ratios = [benchmark.ratios_of(figures) for figures in rounds]
    figures, compared = _by_name(rounds), _by_name(ratios)
    width = max(map(len, [*figures, *compared]), default=0)
    lines = []
    for name, values in figures.items():
        median = f"{statistics.median(values):10,.4g}{_unit(name, benchmark)}"
        notes = [note for start, note in benchmark.notes.items() if name.startswith(start)]
        lines.append("; ".join([f"{name:<{width}} {median} (median of {len(values)})", *notes]))
    for name, values in compared.items():
        median = f"{statistics.median(values):10.3f}"
        lines.append(f"{name:<{width}} {median} (median; {min(values):.3f} to {max(values):.3f})")
    return "\n".join(lines)


def _unit(name: str, benchmark: Benchmark) -> str:
    """Return the unit to print after a figure; empty if its name ends in one, e.g. `[MiB]`."""
    return "" if name.endswith("]") else f" {benchmark.unit}"


def _by_name(rounds: list[Figures]) -> dict[str, list[float]]:
    """Return each name's values in the rounds that have it. A workload may fail in some of them."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: [figures[name] for figures in rounds if name in figures] for name in names}
