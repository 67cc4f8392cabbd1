"""The logged steps and epochs of a run, and the curves they make. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from distributed.run.records import Line, metrics_lines

_STEP = {"loss", "lr", "images_per_second", "data_wait"}
_EPOCH = {"lr", "train_loss", "train_accuracy"}
MAX_EPOCHS = 10**9  # a larger number is damage


class Point(NamedTuple):
    """A value measured after an epoch; epochs count from 1."""

    epoch: int
    value: float


class LrDrop(NamedTuple):
    """A learning rate that fell after an epoch; epochs count from 1."""

    epoch: int
    before: float
    after: float


@dataclass(frozen=True)
class MetricsLog:
    """The lines of metrics.jsonl: `steps` those of logging steps, `epochs` those of epochs."""

    steps: list[Line]
    epochs: list[Line]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a metrics.jsonl. Damaged lines are skipped; a missing file gives an empty log.

        Raises:
            InputError: the file cannot be read.
        """
        lines = metrics_lines(file)
        return cls(
            [line for line in lines if line["kind"] == "train"],
            [line for line in lines if line["kind"] == "epoch" and 0 <= line["epoch"] < MAX_EPOCHS],
        )

    def without_gaps(self) -> "MetricsLog":
        """Return only the lines that have every value a report needs; older versions logged less."""
        return MetricsLog(
            [line for line in self.steps if line.keys() >= _STEP],
            [line for line in self.epochs if line.keys() >= _EPOCH],
        )

    @property
    def finished_epochs(self) -> int:
        return max((line["epoch"] + 1 for line in self.epochs), default=0)

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the end of the first epoch."""
        return self.epochs[0]["step"] / (self.epochs[0]["epoch"] + 1) if self.epochs else None

    @property
    def minutes(self) -> float:
        """Duration of the finished epochs."""
        return sum(as_number(line.get("seconds")) or 0.0 for line in self.epochs) / 60

    def curve(self, split: str, figure: str = "accuracy") -> list[Point]:
        """Return a point per epoch that measured `figure`, accuracy or loss, on a split: train, validation or test."""
        points = []
        for line in self.epochs:
            measured = line.get(split)
            flat = line.get(f"{split}_{figure}")  # the training split, and every split in files of older versions
            value = as_number(measured.get(figure, flat) if isinstance(measured, dict) else flat)
            if value is not None:
                points.append(Point(line["epoch"] + 1, value))
        return points

    def best(self, split: str) -> Point | None:
        """Return the first epoch with the highest accuracy on a split; None if it was never measured."""
        return max(self.curve(split), key=lambda point: point.value, default=None)

    def last(self, split: str, figure: str = "accuracy") -> Point | None:
        """Return the newest measurement on a split; None if it was never measured."""
        curve = self.curve(split, figure)
        return curve[-1] if curve else None

    def lr_drops(self) -> list[LrDrop]:
        """Return every drop of the learning rate between two epochs."""
        pairs = zip(self.epochs, self.epochs[1:], strict=False)
        return [LrDrop(a["epoch"] + 1, a["lr"], b["lr"]) for a, b in pairs if b["lr"] < a["lr"]]


def as_number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None
