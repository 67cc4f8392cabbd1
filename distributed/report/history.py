"""A run as its folder tells it: what was logged, how each attempt went, how it stands. Imports no torch."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from distributed.config import TrainConfig
from distributed.inference.saved_run import read_config
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import EpochRecord, TrainRecord, read_epochs, read_steps
from distributed.run.records import AttemptRecord, Status, read_attempts

_STEP = {"loss", "lr", "images_per_second", "data_wait"}
_EPOCH = {"lr", "train_loss", "train_accuracy"}


@dataclass(frozen=True)
class Attempt:
    """One attempt: `started` and `ended` are lines of attempts.jsonl; without the latter it runs, or was killed."""

    started: AttemptRecord
    ended: AttemptRecord | None

    @property
    def duration(self) -> timedelta | None:
        """From start to end; None where no end was written."""
        return self.ended.moment - self.started.moment if self.ended else None

    @property
    def hardware(self) -> str:
        """`2 processes x 1 thread, AMD EPYC`, as far as it is known."""
        if self.started.event != "started":
            return "ended before it began"
        bits = self.started.bits or {}
        ranks, threads = self.started.world_size or 1, bits.get("threads")
        said = f"{ranks} process{'es' if ranks > 1 else ''}"
        if threads:
            said += f" × {threads} thread{'s' if threads > 1 else ''}"
        return f"{said}, {bits['device']}" if bits.get("device") else said


@dataclass(frozen=True)
class History:
    """All of a run but its tensors. `steps` and `epochs` are the lines of metrics.jsonl of their kind."""

    name: str
    folder: RunFolder
    config: TrainConfig
    status: Status
    attempts: list[Attempt]
    steps: list[TrainRecord]
    epochs: list[EpochRecord]

    @property
    def steps_per_epoch(self) -> float | None:
        """None before the first epoch's end."""
        return self.epochs[0].step / (self.epochs[0].epoch + 1) if self.epochs else None

    @property
    def wall_time(self) -> tuple[timedelta, bool]:
        """The time that the attempts took, and whether that is all: of a killed one the end is not known."""
        durations = [attempt.duration for attempt in self.attempts]
        return sum((d for d in durations if d), timedelta()), None not in durations

    def curve(self, split: str, figure: str) -> tuple[list[int], list[float]]:
        """(epochs counted from 1, values) of `loss` or `accuracy` on `train`, `validation` or `test`."""
        if split == "train":
            points = [(line.epoch + 1, getattr(line, f"train_{figure}")) for line in self.epochs]
        else:
            measured = [(line.epoch + 1, getattr(line, split)) for line in self.epochs]
            points = [(epoch, getattr(record, figure)) for epoch, record in measured if record]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def best(self, split: str) -> tuple[int, float] | None:
        """(epoch, accuracy) of the first epoch with the highest accuracy on a split; None where it was never measured."""
        epochs, values = self.curve(split, "accuracy")
        return max(zip(epochs, values, strict=True), key=lambda point: point[1]) if epochs else None


def read_history(run: Path) -> History:
    """What the folder holds now; the run may still be going on.

    Raises:
        InputError: it is no run's folder.
    """
    folder, config = RunFolder(run), read_config(run)
    return History(
        run.resolve().name,
        folder,
        config,
        folder.status(),
        _attempts([line for line in read_attempts(folder.attempts_file) if line.time]),
        [line for line in read_steps(folder.metrics_file) if line.model_fields_set >= _STEP],
        [line for line in read_epochs(folder.metrics_file) if line.model_fields_set >= _EPOCH],
    )


def _attempts(lines: list[AttemptRecord]) -> list[Attempt]:
    """Each start with the end of the same attempt, by its token. One that failed before it began has its end as start too."""
    ends = {line.token: line for line in lines if line.event != "started"}
    starts = {line.token: line for line in reversed(lines) if line.event == "started"}
    tokens = dict.fromkeys(line.token for line in lines)
    return [Attempt(starts.get(token) or ends[token], ends.get(token)) for token in tokens]
