"""Status and results of a run folder, however damaged its files are."""

import os
from dataclasses import dataclass
from pathlib import Path

from distributed.config.toml_file import from_file
from distributed.errors import InputError
from distributed.run.folder import RunFolder
from distributed.run.lock_holder import why_ended
from distributed.run.metrics_file import EpochRecord, read_epochs
from distributed.run.records import Holder, Status

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
        epochs = [record for record in read_epochs(run / "metrics.jsonl") if 0 <= record.epoch < _MOST_EPOCHS]
    except InputError:
        epochs = []
    validation, tests = _curve(epochs, "validation"), _curve(epochs, "test")
    return Outcome(
        status=_status(status, run),
        epochs=max((record.epoch + 1 for record in epochs), default=0),
        of_epochs=_planned_epochs(run),
        best=max(validation, key=lambda point: point[1], default=None),
        test=tests[-1] if tests else None,
        train_loss=_number(epochs[-1].train_loss) if epochs else None,
        when=_text(status.time)[:16].replace("T", " "),
        minutes=sum(_number(record.seconds) or 0.0 for record in epochs) / 60,
    )


def _status(status: Status, run: Path) -> str:
    """As status.json has it; `interrupted` if the process that wrote `running` is known to have ended."""
    said = _text(status.status)
    return "interrupted" if said == "running" and why_ended(Holder.read(run / "attempt.json")) else said or "unknown"


def _planned_epochs(run: Path) -> int | None:
    try:
        epochs = from_file(run / "config.toml").values.get("epochs")
    except InputError:
        return None
    return epochs if type(epochs) is int and 0 < epochs < _MOST_EPOCHS else None


def _curve(epochs: list[EpochRecord], split: str) -> list[tuple[int, float]]:
    """(epoch counted from 1, accuracy) where it was measured."""
    points = []
    for record in epochs:
        measured = getattr(record, split)
        if measured and (accuracy := _number(measured.accuracy)) is not None:
            points.append((record.epoch + 1, accuracy))
    return points


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and abs(value) < 1e300 else None


def _text(value: str | None) -> str:
    """A short text that goes on one line; else nothing."""
    return value if value and value.isprintable() and len(value) <= 40 else ""
