"""`python -m distributed.bench train | startup | save`: speed against what else could be run, in interleaved rounds."""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.bench.rounds import Contender, machine, median_step_seconds
from distributed.data import cifar
from distributed.errors import ExitCode, InputError

Round = dict[str, float]
BATCH = 128


def _ours(steps: int, root: Path, folder: str, threads: int, *more: str) -> dict[str, Any]:
    settings = ["--epochs", "20", "--global_batch_size", str(BATCH), "--data.validation_fraction", "0"]
    where = [
        "--data.name",
        "cifar10",
        "--data.root",
        str(root),
        "--run_dir",
        f"{folder}/run",
        "--threads",
        str(threads),
    ]
    return {"steps": steps, "arguments": [*settings, *where, *more]}


def train_round(root: Path, steps: int) -> Round:
    """Images a second of the seeds' plain loop, of compute alone, and of ours on one and on two processes."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        contenders = {
            "seeds' plain loop": Contender("seed_loop", {"root": str(root), "steps": steps, "threads": 2}),
            "compute alone": Contender("compute_alone", {"steps": steps, "threads": 2}),
            "ours, 1 process x 2 threads": Contender("ours", _ours(steps, root, one, 2)),
            "ours, 2 processes x 1 thread": Contender("ours", _ours(steps, root, two, 1), ranks=2),
        }
        skip = steps // 4
        return {name: BATCH / median_step_seconds(c.clock()[1], skip=skip) for name, c in contenders.items()}


def train_ratios(r: Round) -> Round:
    one, two = r["ours, 1 process x 2 threads"], r["ours, 2 processes x 1 thread"]
    return {
        "ours (1 process) / seeds' plain loop": one / r["seeds' plain loop"],
        "ours (1 process) / compute alone": one / r["compute alone"],
        "ours (2 processes) / compute alone": two / r["compute alone"],
    }


def startup_round(root: Path, _: int) -> Round:
    """Seconds from launch to the first step, and to a process group alone; two processes each."""
    with tempfile.TemporaryDirectory() as folder:
        first_step = Contender("ours", _ours(1, root, folder, 1), ranks=2)
        alone = Contender("process_group_alone", {}, ranks=2)
        seconds = {}
        for name, contender in (("to the first step", first_step), ("to a process group", alone)):
            start, clock = contender.clock()
            seconds[name] = clock[0] - start
        return seconds


def startup_ratios(r: Round) -> Round:
    return {"first step / process group alone": r["to the first step"] / r["to a process group"]}


def save_round(root: Path, steps: int) -> Round:
    """Seconds that a save adds to training: the mean step with a save every 20 steps against that without."""
    every, skip = 20, 20
    found = {}
    for name, save in (("mean step with saves", every), ("mean step without", 0)):
        with tempfile.TemporaryDirectory() as folder:
            saving = ["--checkpoint.every_steps", str(save), "--checkpoint.every_minutes", "0"]
            _, clock = Contender("ours", _ours(steps * 2, root, folder, 1, *saving), ranks=2).clock()
            found[name] = (clock[-1] - clock[skip]) / (len(clock) - 1 - skip)
    return found


def save_ratios(r: Round) -> Round:
    added = 20 * (r["mean step with saves"] - r["mean step without"])
    return {"time a save adds / a step": added / r["mean step without"]}


KINDS: dict[str, tuple[Callable[[Path, int], Round], Callable[[Round], Round], str]] = {
    "train": (train_round, train_ratios, "images/s"),
    "startup": (startup_round, startup_ratios, "s"),
    "save": (save_round, save_ratios, "s"),
}


def main() -> int:
    """Run the rounds, print medians and ratios, write them as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m distributed.bench", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data.root", dest="root", type=Path, default=Path("data"), help="folder with CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80, help="steps a contender and round")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    try:
        cifar.check("cifar10", arguments.root)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    measure, ratios_of, unit = KINDS[arguments.kind]
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(measure(arguments.root.resolve(), arguments.steps))
        print(f"round {number + 1}: " + ", ".join(f"{k} {v:,.4g}" for k, v in rounds[-1].items()), file=sys.stderr)
    ratios = [ratios_of(r) for r in rounds]
    figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    compared = {name: sorted(r[name] for r in ratios) for name in ratios[0]}
    for name, value in figures.items():
        print(f"{name:<40} {value:10,.4g} {unit} (median of {len(rounds)})")
    for name, values in compared.items():
        print(f"{name:<40} {statistics.median(values):10.3f} (median; {values[0]:.3f} to {values[-1]:.3f})")
    if arguments.json:
        command = f"python -m distributed.bench {arguments.kind} --rounds {arguments.rounds} --steps {arguments.steps}"
        content = {"command": command, "machine": machine(), "rounds": rounds, "ratios": ratios}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
