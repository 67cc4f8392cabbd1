"""The runs of `bench accuracy`: their curves, the seconds to each accuracy, and means over the seeds. Imports no torch."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from distributed.errors import InputError
from distributed.process.output_file import write_output

TARGETS = (80, 90, 94)
"""Test accuracies in percent."""
SIDES = ("ours", "timm")
FINAL = "final accuracy"
Curve = Sequence[Sequence[float]]
"""Seconds of training and test accuracy, after each epoch."""


def seconds_to(curve: Curve, percent: float) -> float | None:
    """Return the seconds of training after the first epoch with this test accuracy; None if no epoch reached it."""
    return next((seconds for seconds, accuracy in curve if accuracy >= percent / 100), None)


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        seconds: all of its training.
        accuracy: the test accuracy at its end.
        git: commit of the code, with `+changes` if files were modified; empty if unknown, as in earlier files.
    """

    seed: int
    side: str
    date: str
    seconds_to: dict[str, float | None]
    seconds: float
    accuracy: float
    curve: Curve
    git: str = ""

    @classmethod
    def of(cls, seed: int, side: str, date: str, curve: Curve, git: str) -> Self:
        """Return the run with this curve."""
        reached = {str(percent): seconds_to(curve, percent) for percent in TARGETS}
        seconds, accuracy = curve[-1]
        return cls(seed, side, date, reached, seconds, accuracy, curve, git)


class Spread(NamedTuple):
    """Mean and standard deviation over those seeds that have a figure: `found` of `seeds`.

    The mean is None without a figure, the deviation with fewer than two.
    """

    mean: float | None
    deviation: float | None
    found: int
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Self:
        """Return the spread of one value per seed."""
        found = [value for value in values if value is not None]
        mean = statistics.fmean(found) if found else None
        return cls(mean, statistics.stdev(found) if len(found) > 1 else None, len(found), len(values))


def summary(runs: Sequence[Run]) -> dict[str, dict[str, Spread]]:
    """Return for each side the spread of the seconds to each accuracy, of all seconds and of the final accuracy."""
    found = {}
    for side in SIDES:
        own = [run for run in runs if run.side == side]
        if own:
            spreads = {f"seconds to {p} %": Spread.of([run.seconds_to[str(p)] for run in own]) for p in TARGETS}
            spreads["seconds in all"] = Spread.of([run.seconds for run in own])
            found[side] = spreads | {FINAL: Spread.of([run.accuracy for run in own])}
    return found


@dataclass
class Results:
    """What the JSON file holds; `outputs` of failed runs are written beside it.

    Attributes:
        settings: the config, except for the seed and folders.
        differences: what timm's side does otherwise, one sentence each.
        failed: the line of each run that failed, by side and seed.
    """

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    differences: list[str]
    runs: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    outputs: str = ""

    def has(self, side: str, seed: int) -> bool:
        """Return whether this run is finished."""
        return any((run.side, run.seed) == (side, seed) for run in self.runs)

    def write(self, file: Path) -> None:
        """Write the results to `file`, with the means over the seeds."""
        content = {name: value for name, value in asdict(self).items() if name != "outputs"}
        content["runs"] = sorted(content["runs"], key=lambda run: (run["seed"], SIDES.index(run["side"])))
        content["summary"] = {
            side: {name: spread._asdict() for name, spread in spreads.items()}
            for side, spreads in summary(self.runs).items()
        }
        write_output(file, (json.dumps(content, indent=1) + "\n").encode())
        if self.outputs:
            write_output(file.with_suffix(".failed.txt"), self.outputs.encode())

    def resume(self, file: Path) -> None:
        """Take over the finished runs in `file`, if it is one: reading a pipe would not end.

        Raises:
            InputError: it has other content, or its runs had other settings or another machine.
        """
        if not file.is_file():
            return
        try:
            content = json.loads(file.read_text())
            runs, settings, machine = [Run(**run) for run in content["runs"]], content["settings"], content["machine"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"--json {file}: is not a file of bench accuracy; name another file") from None
        now = json.loads(json.dumps({"settings": self.settings, "machine": _comparable(self.machine)}))
        then = {"settings": settings, "machine": _comparable(machine)}
        if changed := _changes(then, now):
            raise InputError(f"--json {file}: has runs with {changed[0]}; name another file, or delete it")
        self.runs = runs


def _comparable(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be the same for all runs in a file."""
    return {name: value for name, value in machine.items() if name not in ("date", "git")}


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return each value that differs, e.g. `settings.epochs = 1, not 10`."""
    found = []
    for name in dict.fromkeys([*then, *now]):
        before, after, path = then.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            found += _changes(before, after, f"{path}.")
        elif before != after:
            found.append(f"{path} = {before}, not {after}")
    return found
