"""The logged steps and epochs of a run, and curves through them. Imports no torch."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

from distributed.run.metrics_file import EpochRecord, TrainRecord, read_metrics

MAX_EPOCHS = 10**9  # a larger number is damage

FIGURES = ("accuracy", "loss")


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
    """The records of metrics.jsonl: `steps` for logged steps, `epochs` for finished epochs."""

    steps: list[TrainRecord]
    epochs: list[EpochRecord]

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a metrics.jsonl. Damaged lines are skipped; a missing file gives an empty log.

        Raises:
            InputError: the file cannot be read.
        """
        records = read_metrics(file)
        return cls(
            [record for record in records if isinstance(record, TrainRecord)],
            [record for record in records if isinstance(record, EpochRecord) and 0 <= record.epoch < MAX_EPOCHS],
        )

    def without_gaps(self) -> "MetricsLog":
        """Return only the records that have every number needed for curves; older versions logged less."""
        return MetricsLog(
            [record for record in self.steps if None not in (record.lr, record.images_per_second, record.data_wait)],
            [record for record in self.epochs if record.lr is not None],
        )

    @property
    def finished_epochs(self) -> int:
        return max((record.epoch + 1 for record in self.epochs), default=0)

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the end of the first epoch."""
        return self.epochs[0].step / (self.epochs[0].epoch + 1) if self.epochs else None

    @property
    def minutes(self) -> float:
        """Duration of the finished epochs."""
        return sum(_finite(record.seconds) or 0.0 for record in self.epochs) / 60

    @property
    def further_metrics(self) -> list[str]:
        """Return the names of the metrics of `evaluation.metrics` that were logged, in their order."""
        splits = [split for record in self.epochs for split in (record.validation, record.test) if split]
        names = dict.fromkeys(name for split in splits for name in split.model_extra or {})
        return [name for name in names if name.isidentifier()]

    def curve(self, split: str, figure: str = "accuracy") -> list[Point]:
        """Return a point per epoch that measured a figure on a split: train, validation or test."""
        points = []
        for record in self.epochs:
            measured = record if split == "train" else getattr(record, split)
            value = _finite(getattr(measured, f"train_{figure}" if split == "train" else figure, None))
            if value is not None:
                points.append(Point(record.epoch + 1, value))
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
        rates = [(record.epoch + 1, record.lr) for record in self.epochs if record.lr is not None]
        return [LrDrop(epoch, before, after) for (epoch, before), (_, after) in pairwise(rates) if after < before]


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None
