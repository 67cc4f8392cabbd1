"""Status and results of a run folder, however damaged its files are."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.config.toml_file import from_file
from distributed.errors import InputError
from distributed.files import read_object
from distributed.run.folder import RunFolder
from distributed.run.lock_holder import gone
from distributed.run.records import Line, metrics_lines

_MARKS = {"status.json", "attempts.jsonl", "config.toml"}
_INNER = {"checkpoints", "tensorboard", "logs", "profile", "export", "ray", "slurm"}
_MOST_EPOCHS = 10**9  # a larger number is damage


@dataclass(frozen=True)
class Outcome:
    """How a run stands; None for what its folder does not say.

    `best` and `test` are (epoch counted from 1, accuracy): the highest on validation, and the newest on the test split.
    """

    status: str
    epochs: int
    of_epochs: int | None
    best: tuple[int, float] | None
    test: tuple[int, float] | None
    train_loss: float | None
    when: str
    minutes: float

    @property
    def progress(self) -> str:
        """`3 of 10`."""
        return f"{self.epochs} of {'?' if self.of_epochs is None else self.of_epochs}"


def runs_below(folder: Path) -> list[Path]:
    """Every run folder in there and below, `seed-2` before `seed-10`; the folder itself, if it is one."""
    found = []
    for path, inner, files in os.walk(folder):
        is_run = bool(_MARKS & set(files))
        if is_run:
            found.append(Path(path))
        inner[:] = [name for name in inner if not name.startswith(".") and not (is_run and name in _INNER)]
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    parts = "".join(c if c.isdecimal() else f"\0{c}\0" for c in str(path)).split("\0")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]


def outcome_of(run: Path) -> Outcome:
    """What the files say that can be read."""
    status = RunFolder(run).status()
    try:
        lines = metrics_lines(run / "metrics.jsonl")
        epochs = [line for line in lines if line["kind"] == "epoch" and 0 <= line["epoch"] < _MOST_EPOCHS]
    except InputError:
        epochs = []
    validation, tests = _curve(epochs, "validation"), _curve(epochs, "test")
    return Outcome(
        status=_status(status, run),
        epochs=max((line["epoch"] + 1 for line in epochs), default=0),
        of_epochs=_planned_epochs(run),
        best=max(validation, key=lambda point: point[1], default=None),
        test=tests[-1] if tests else None,
        train_loss=_number(epochs[-1].get("train_loss")) if epochs else None,
        when=_text(status.get("time"))[:16].replace("T", " "),
        minutes=sum(_number(line.get("seconds")) or 0.0 for line in epochs) / 60,
    )


def _status(status: dict[str, Any], run: Path) -> str:
    """As status.json has it; `interrupted` if the process that wrote `running` is known to have ended."""
    said = _text(status.get("status"))
    return "interrupted" if said == "running" and gone(read_object(run / "attempt.json")) else said or "unknown"


def _planned_epochs(run: Path) -> int | None:
    try:
        epochs = from_file(run / "config.toml").values.get("epochs")
    except InputError:
        return None
    return epochs if type(epochs) is int and 0 < epochs < _MOST_EPOCHS else None


def _curve(epochs: list[Line], split: str) -> list[tuple[int, float]]:
    """(epoch counted from 1, accuracy) where it was measured. Files of older versions hold it flat."""
    points = []
    for line in epochs:
        measured = line.get(split)
        flat = measured if isinstance(measured, dict) else {"accuracy": line.get(f"{split}_accuracy")}
        if (accuracy := _number(flat.get("accuracy"))) is not None:
            points.append((line["epoch"] + 1, accuracy))
    return points


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _text(value: Any) -> str:
    """A short text that goes on one line; else nothing."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 40 else ""
