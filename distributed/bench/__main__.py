"""`python -m distributed.bench train | exact | engines | startup | save | norm`: speed against what else could be run, in
interleaved rounds. `memory`: what a rank holds under each engine."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distributed.bench import train
from distributed.bench.kinds import KINDS, Kind, Round
from distributed.bench.memory import table
from distributed.bench.options import CONTENDERS, Options
from distributed.bench.rounds import ContenderFailedError, machine
from distributed.data.sources import cifar
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import check_writable, home_path, write_output
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.streams import run_command


def main() -> int:
    """Run the rounds, print medians and ratios, write them as JSON if asked; 1 if a contender failed."""
    given = _parser().parse_args()
    if given.kind == "memory":
        table(given.json)
        return ExitCode.FINISHED
    try:
        options = Options.of(given)
        if given.kind != "norm":
            cifar.check("cifar10", options.root)
        if given.json:
            check_writable("--json", given.json)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    kind = KINDS[given.kind]
    deadline = time.monotonic() + 60 * given.minutes
    skipped = train.skipped(options) if given.kind == "train" else {}
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr, flush=True)
    content: dict[str, Any] = {"command": _command(given, options), "machine": machine(options.device)}
    content |= {"rounds": [], "ratios": [], "failed": [], "skipped": skipped}
    outputs = ""
    for number in range(given.rounds or (1 if options.gpus else 5)):
        figures, errors = run_round(kind, options, deadline, label=f"round {number + 1}: ")
        content["rounds"].append(figures)
        content["ratios"].append(kind.ratios_of(figures))
        content["failed"].append({name: str(error) for name, error in errors.items()})
        outputs += "".join(f"{name}: {error}\n{error.output}\n\n" for name, error in errors.items())
        if given.json:
            with OptionalOutput(given.json):  # for now; the rounds are what takes long
                _write(given.json, content, outputs)
    print(summary(kind, content["rounds"]))
    try:
        if given.json:
            with requested_output("--json", given.json):
                _write(given.json, content, outputs)
    except StorageError as error:
        return error.tell()
    return ExitCode.FAILED if outputs else ExitCode.FINISHED


def _write(file: Path, content: dict[str, Any], outputs: str) -> None:
    write_output(file, (json.dumps(content, indent=1) + "\n").encode())
    if outputs:
        write_output(file.with_suffix(".failed.txt"), outputs.encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distributed.bench", description=__doc__)
    parser.add_argument("kind", choices=[*KINDS, "memory"])
    parser.add_argument("--data.root", dest="root", type=home_path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of all contenders; auto: CUDA if available",
    )
    parser.add_argument("--rounds", type=int, help="default: 5, on CUDA 1")
    parser.add_argument("--steps", type=int, help="steps per contender and round; default: 80, on CUDA 100")
    parser.add_argument("--batches", type=int, nargs="+", help="train: batch sizes; default: 128, on CUDA 128 512 2048")
    names = "; ".join(f"{name}: {what}" for name, what in CONTENDERS.items())
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=f"train: run only these. {names}"
    )
    parser.add_argument(
        "--seconds", type=float, help="time limit per contender, startup included; default: none, on CUDA 40"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="total time limit; contenders that would start later are skipped",
    )
    parser.add_argument(
        "--json", type=home_path, help="also write results here, and the output of failed contenders beside it"
    )
    return parser


def run_round(
    kind: Kind, options: Options, deadline: float, *, label: str = ""
) -> tuple[Round, dict[str, ContenderFailedError]]:
    """Measure every contender once.

    Args:
        deadline: CLOCK_MONOTONIC at which the last one is ended and no other is started.

    Returns:
        The figures, and by name the errors of contenders that failed.
    """
    figures: Round = {}
    failed: dict[str, ContenderFailedError] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, contender in kind.contenders(options, folder).items():
            start = time.monotonic()
            seconds = min(options.seconds or float("inf"), deadline - start)
            try:
                if seconds <= 0:
                    raise ContenderFailedError("not started: no time was left")
                measured = contender.measure(None if seconds == float("inf") else seconds)
                new = kind.figures_of(name, contender, measured)
            except ContenderFailedError as error:
                failed[name] = error
                print(f"{label}failed: {name}: {error}", file=sys.stderr, flush=True)
                continue
            figures |= new
            values = ", ".join(f"{key} {value:,.4g}" for key, value in new.items())
            print(f"{label}{values} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    return figures, failed


def summary(kind: Kind, rounds: list[Round]) -> str:
    """Medians over the rounds, and of the ratios their range too; a line each."""
    ratios = [kind.ratios_of(figures) for figures in rounds]
    figures, compared = _by_name(rounds), _by_name(ratios)
    width = max(map(len, [*figures, *compared]), default=0)
    lines = []
    for name, values in figures.items():
        unit = "" if name.endswith("]") else f" {kind.unit}"
        lines.append(f"{name:<{width}} {statistics.median(values):10,.4g}{unit} (median of {len(values)})")
    for name, values in compared.items():
        lines.append(
            f"{name:<{width}} {statistics.median(values):10.3f} (median; {min(values):.3f} to {max(values):.3f})"
        )
    return "\n".join(lines)


def _by_name(rounds: list[Round]) -> dict[str, list[float]]:
    """Values by name over the rounds that have it: a contender may fail in one."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: [figures[name] for figures in rounds if name in figures] for name in names}


def _command(given: argparse.Namespace, options: Options) -> str:
    """The command that repeats this measurement, without --data.root and time limits."""
    rounds = given.rounds or (1 if options.gpus else 5)
    words: list[Any] = [given.kind, "--device", options.device, "--rounds", rounds, "--steps", options.steps]
    if given.kind == "train":
        words += ["--batches", *options.batches, "--contenders", *options.contenders]
    return " ".join(map(str, ["python -m distributed.bench", *words]))


if __name__ == "__main__":
    run_command(main)
