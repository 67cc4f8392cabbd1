"""`python -m distributed.bench train | exact | engines | startup | save | norm`: measures speed in interleaved rounds.
`python -m distributed.bench memory`: measures the memory a rank needs under each engine."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distributed.bench import training_speed
from distributed.bench.benchmarks import BENCHMARKS, Benchmark, Figures
from distributed.bench.machine import machine
from distributed.bench.memory import measure_all
from distributed.bench.options import WORKLOADS, Options
from distributed.bench.workload import WorkloadFailedError
from distributed.data.sources import cifar
from distributed.errors import ExitCode, prints_errors
from distributed.files import check_writable, home_path, write_output
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.streams import run_command


@prints_errors
def main() -> int:
    """Run the rounds, print medians and ratios, and write them as JSON on request. Return 1 if a workload failed."""
    arguments = _parser().parse_args()
    if arguments.benchmark == "memory":
        measure_all(arguments.json)
        return ExitCode.FINISHED
    options = Options.of(arguments)
    if arguments.benchmark != "norm":
        cifar.check("cifar10", options.root)
    if arguments.json:
        check_writable("--json", arguments.json)
    results = _run_rounds(arguments, options)
    print(summary(BENCHMARKS[arguments.benchmark], results.rounds))
    if arguments.json:
        with requested_output("--json", arguments.json):
            results.write(arguments.json)
    return ExitCode.FAILED if results.outputs else ExitCode.FINISHED


@dataclass
class Results:
    """A benchmark's results so far; all but `outputs` are written as JSON.

    Attributes:
        ratios, failed: one entry per round.
        skipped: workloads that cannot run here, each with the reason.
        outputs: output of the workloads that failed.
    """

    command: str
    machine: dict[str, Any]
    rounds: list[Figures] = field(default_factory=list)
    ratios: list[Figures] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    outputs: str = ""

    def write(self, file: Path) -> None:
        """Write the results to `file`, and the output of failed workloads beside it."""
        content = {name: value for name, value in asdict(self).items() if name != "outputs"}
        write_output(file, (json.dumps(content, indent=1) + "\n").encode())
        if self.outputs:
            write_output(file.with_suffix(".failed.txt"), self.outputs.encode())


def _run_rounds(arguments: argparse.Namespace, options: Options) -> Results:
    benchmark = BENCHMARKS[arguments.benchmark]
    deadline = time.monotonic() + 60 * arguments.minutes
    results = Results(_command(arguments, options), machine(options.device))
    results.skipped = training_speed.skipped(options) if arguments.benchmark == "train" else {}
    for name, reason in results.skipped.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr, flush=True)
    for number in range(_rounds(arguments, options)):
        figures, errors = run_round(benchmark, options, deadline, label=f"round {number + 1}: ")
        results.rounds.append(figures)
        results.ratios.append(benchmark.ratios_of(figures))
        results.failed.append({name: str(error) for name, error in errors.items()})
        results.outputs += "".join(f"{name}: {error}\n{error.output}\n\n" for name, error in errors.items())
        if arguments.json:
            with OptionalOutput(arguments.json):  # rounds take long: a failed write must not end the benchmark
                results.write(arguments.json)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distributed.bench", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "memory"])
    parser.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of all workloads; auto: CUDA if available",
    )
    parser.add_argument("--rounds", type=int, help="default: 5, on CUDA 1")
    parser.add_argument("--steps", type=int, help="steps per workload and round; default: 80, on CUDA 100")
    parser.add_argument("--batches", type=int, nargs="+", help="train: batch sizes; default: 128, on CUDA 128 512 2048")
    names = "; ".join(f"{name}: {meaning}" for name, meaning in WORKLOADS.items())
    parser.add_argument(
        "--workloads", "--contenders", nargs="+", choices=list(WORKLOADS), metavar="NAME",
        help=f"train: run only these. {names}",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, help="time limit per workload, startup included; default: none, on CUDA 40"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="total time limit; workloads that would start later are skipped",
    )
    parser.add_argument(
        "--json", type=home_path, help="also write results here, and the output of failed workloads beside it"
    )
    return parser


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
            seconds = min(options.seconds or float("inf"), deadline - start)
            try:
                if seconds <= 0:
                    raise WorkloadFailedError("not started: the time limit --minutes is reached")
                measured = workload.measure(None if seconds == float("inf") else seconds)
                new = benchmark.figures_of(name, workload, measured)
            except WorkloadFailedError as error:
                failed[name] = error
                print(f"{label}failed: {name}: {error}", file=sys.stderr, flush=True)
                continue
            figures |= new
            values = ", ".join(f"{key}: {value:,.4g}{_unit(key, benchmark)}" for key, value in new.items())
            print(f"{label}{values} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    return RoundResult(figures, failed)


def summary(benchmark: Benchmark, rounds: list[Figures]) -> str:
    """Return a line per figure and per ratio: its median over the rounds, and the range of a ratio."""
    ratios = [benchmark.ratios_of(figures) for figures in rounds]
    figures, compared = _by_name(rounds), _by_name(ratios)
    width = max(map(len, [*figures, *compared]), default=0)
    lines = []
    for name, values in figures.items():
        median = f"{statistics.median(values):10,.4g}{_unit(name, benchmark)}"
        lines.append(f"{name:<{width}} {median} (median of {len(values)})")
    for name, values in compared.items():
        lines.append(
            f"{name:<{width}} {statistics.median(values):10.3f} (median; {min(values):.3f} to {max(values):.3f})"
        )
    return "\n".join(lines)


def _unit(name: str, benchmark: Benchmark) -> str:
    """Return the unit to print after a figure; empty if its name ends in one, e.g. `[MiB]`."""
    return "" if name.endswith("]") else f" {benchmark.unit}"


def _by_name(rounds: list[Figures]) -> dict[str, list[float]]:
    """Return each name's values in the rounds that have it. A workload may fail in some of them."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: [figures[name] for figures in rounds if name in figures] for name in names}


def _rounds(arguments: argparse.Namespace, options: Options) -> int:
    return int(arguments.rounds or (1 if options.gpus else 5))


def _command(arguments: argparse.Namespace, options: Options) -> str:
    """Return the command that repeats this measurement, without --data.root and time limits."""
    repeated: list[Any] = [
        arguments.benchmark, "--device", options.device, "--rounds", _rounds(arguments, options), "--steps", options.steps,
    ]  # fmt: skip
    if arguments.benchmark == "train":
        repeated += ["--batches", *options.batches, "--workloads", *options.workloads]
    return " ".join(map(str, ["python -m distributed.bench", *repeated]))


if __name__ == "__main__":
    run_command(main)
