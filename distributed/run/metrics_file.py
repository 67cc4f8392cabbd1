"""Records of metrics.jsonl: training steps and epochs. Imports no torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from distributed.run.records import Integer, Number, Record, Text, parse, read_objects


class SplitRecord(Record):
    """Metrics of one evaluated split."""

    loss: Number = None
    accuracy: Number = None
    accuracy5: Number = None


class TrainRecord(Record):
    """A line of metrics.jsonl: means over the training steps since the previous such line, or since
    the beginning of the epoch."""

    kind: Literal["train"]
    data: Text = None
    epoch: int
    step: int
    loss: Number = None
    accuracy: Number = None
    lr: Number = None
    grad_norm: Number = None
    images_per_second: Number = None
    data_wait: Number = None
    memory_mib: Number = None
    eta_seconds: Number = None
    skipped_steps: Integer = None


class EpochRecord(Record):
    """A line of metrics.jsonl: means over the training steps of an epoch, and the evaluated splits."""

    kind: Literal["epoch"]
    data: Text = None
    epoch: int
    step: int
    lr: Number = None
    train_loss: Number = None
    train_accuracy: Number = None
    validation: SplitRecord | None = None
    test: SplitRecord | None = None
    is_best: bool = False
    seconds: Number = None

    @model_validator(mode="before")
    @classmethod
    def _without_damaged_splits(cls, content: Any) -> Any:
        """Read a damaged split as None."""
        if not isinstance(content, dict):
            return content
        splits = {split: content[split] for split in ("validation", "test") if split in content}
        return content | {k: v if isinstance(v, dict | SplitRecord) else None for k, v in splits.items()}


MetricsRecord = TrainRecord | EpochRecord

MACHINE_METRICS = {"images_per_second", "data_wait", "memory_mib", "eta_seconds", "seconds"}
"""Fields that depend on the machine, not on the run."""


def read_metrics(file: Path) -> list[MetricsRecord]:
    """Read metrics.jsonl.

    Raises:
        InputError: the file exists and cannot be read.
    """
    return [record for line in read_objects(file) if (record := _record(line))]


def parse_metrics(text: bytes) -> MetricsRecord | None:
    """Return a line of metrics.jsonl; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _record(line) if isinstance(line, dict) else None


def _record(line: dict[str, Any]) -> MetricsRecord | None:
    return parse(line, EpochRecord) if line.get("kind") == "epoch" else parse(line, TrainRecord)


def read_epochs(file: Path) -> list[EpochRecord]:
    """Read the lines of metrics.jsonl about epochs. Raises InputError as `read_metrics` does."""
    return [record for record in read_metrics(file) if isinstance(record, EpochRecord)]
