"""Records in the files of a run folder: status.json, attempts.jsonl, metrics.jsonl, digests.jsonl. Imports no torch.

Readers skip damaged lines, e.g. the incomplete last line of a killed run. Fields that older versions did not write are None.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, field_validator, model_validator

from distributed.errors import InputError
from distributed.files import lines_of, read_object

_TIME = "%Y-%m-%dT%H:%M:%S%z"

# Fields that no reader relies on: a value of another type is read as None, and does not invalidate the record.
Text = Annotated[str | None, PlainValidator(lambda value: value if isinstance(value, str) else None)]
Integer = Annotated[int | None, PlainValidator(lambda value: value if isinstance(value, int) else None)]
Number = Annotated[float | None, PlainValidator(lambda value: value if isinstance(value, int | float) else None)]


class Record(BaseModel):
    """A JSON object in a file of a run. Unknown fields, of other versions, are kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", defer_build=True)

    def as_json(self) -> dict[str, Any]:
        """Return the fields that were set, in the order of their declaration."""
        return self.model_dump(exclude_unset=True)


class Status(Record):
    """status.json: state and progress of the latest attempt. All fields are None if there was none."""

    status: Text = None  # running, finished, stopped or failed
    time: Text = None
    pid: Integer = None
    host: Text = None
    world_size: Integer = None
    reason: Text = None
    exit_code: Integer = None
    step: Integer = None
    saved_step: Integer = None
    epoch: Integer = None

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.model_validate(read_object(file))


class AttemptRecord(Record):
    """A line of attempts.jsonl: the start or the end of an attempt, or a decision of launch.slurm about it."""

    event: str  # started, finished, stopped or failed; of launch.slurm: requeued, left to Slurm, ended or lost
    time: str | None = None
    token: Text = None
    pid: Integer = None
    host: Text = None
    job: Text = None
    reason: Text = None
    exit_code: Integer = None
    step: int | None = None
    epoch: Integer = None
    world_size: int | None = None
    versions: dict[str, Any] | None = None
    git: Text = None
    bits: dict[str, Any] | None = None  # everything that the results depend on: shards, hardware, libraries
    images: dict[str, dict[str, Any]] | None = None  # identity of each split's images

    @property
    def moment(self) -> datetime:
        """When the line was written. Valid only if `time` is set."""
        return datetime.strptime(self.time or "", _TIME)

    @field_validator("time")
    @classmethod
    def _check_time(cls, time: str | None) -> str | None:
        if time is not None:
            datetime.strptime(time, _TIME)
        return time

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: dict[str, Any] | None) -> dict[str, Any] | None:
        if bits and not isinstance(bits.get("versions", {}), dict):
            raise ValueError("versions should be an object")
        return bits


class SplitRecord(Record):
    """Metrics of one evaluated split."""

    loss: Number = None
    accuracy: Number = None
    accuracy5: Number = None


def _split_or_none(value: Any) -> Any:
    return value if isinstance(value, dict | SplitRecord) else None


class TrainRecord(Record):
    """A line of metrics.jsonl: means over the training steps since the previous such line."""

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
    def _nest_splits(cls, content: Any) -> Any:
        """Read `validation_accuracy`, as older versions wrote it, as `validation.accuracy`; a damaged split as None."""
        if not isinstance(content, dict):
            return content
        nested = dict(content)
        for split in ("validation", "test"):
            flat = {name: content[f"{split}_{name}"] for name in ("accuracy", "loss") if f"{split}_{name}" in content}
            if not isinstance(content.get(split), dict | SplitRecord) and (split in content or flat):
                nested[split] = flat or None
        return nested


class SaveRecord(Record):
    """A line of digests.jsonl: the digest of each tensor of a checkpoint, by name."""

    name: str
    tensors: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.name.split("-")[1])

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not "".join(name.split("-")[1:2]).isdecimal():
            raise ValueError("should be the name of a checkpoint")
        return name


R = TypeVar("R", bound=Record)


def read_metrics(file: Path) -> list[TrainRecord | EpochRecord]:
    """Read metrics.jsonl.

    Raises:
        InputError: the file exists and cannot be read; also below.
    """
    found: list[TrainRecord | EpochRecord] = []
    for line in _objects(file):
        record = _parse(line, EpochRecord) if line.get("kind") == "epoch" else _parse(line, TrainRecord)
        if record:
            found.append(record)
    return found


def read_steps(file: Path) -> list[TrainRecord]:
    """Read the lines of training steps of metrics.jsonl."""
    return [record for record in read_metrics(file) if isinstance(record, TrainRecord)]


def read_epochs(file: Path) -> list[EpochRecord]:
    """Read the lines of epochs of metrics.jsonl."""
    return [record for record in read_metrics(file) if isinstance(record, EpochRecord)]


def read_attempts(file: Path) -> list[AttemptRecord]:
    """Read attempts.jsonl."""
    return [record for line in _objects(file) if (record := _parse(line, AttemptRecord))]


def read_saves(file: Path) -> list[SaveRecord]:
    """Read digests.jsonl."""
    return [record for line in _objects(file) if (record := _parse(line, SaveRecord))]


def _parse(line: dict[str, Any], kind: type[R]) -> R | None:
    try:
        return kind.model_validate(line)
    except ValidationError:
        return None


def _objects(file: Path) -> list[dict[str, Any]]:
    """The lines of a file that are JSON objects."""
    try:
        texts = list(lines_of(file))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; fix its permissions, or name another run") from None
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
