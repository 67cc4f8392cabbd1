"""Records in the files of a run folder: status.json, attempt.json, attempts.jsonl, digests.jsonl. Imports no torch.

Readers skip damaged lines, e.g. the incomplete last line of a killed run. Fields that older versions did not write are None.
"""

import json
import math
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainValidator,
    ValidationError,
    field_validator,
)

from distributed.errors import InputError
from distributed.files import lines_of, read_object

_TIME = "%Y-%m-%dT%H:%M:%S%z"

# Lenient fields: a value of another type is read as None, and does not invalidate the record.
Text = Annotated[str | None, PlainValidator(lambda value: value if isinstance(value, str) else None)]
Integer = Annotated[int | None, PlainValidator(lambda value: value if isinstance(value, int) else None)]
Number = Annotated[float | None, PlainValidator(lambda value: value if isinstance(value, int | float) else None)]


class Record(BaseModel):
    """A JSON object in a file of a run. Unknown fields, e.g. of other versions, are preserved."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", defer_build=True)

    def as_json(self) -> dict[str, Any]:
        """Return the fields that were set, in the order of their declaration. Numbers that are not finite become None."""
        return {name: _finite(value) for name, value in self.model_dump(exclude_unset=True).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def timestamp() -> str:
    """Return the current time in the format of all records."""
    return time.strftime(_TIME)


class FileRecord(Record):
    """The content of a JSON file. All fields are lenient, so they are None if the file is missing or damaged."""

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls.model_validate(read_object(file))


class Status(FileRecord):
    """status.json: state and progress of the latest attempt."""

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


class SlurmRecord(Record):
    """The Slurm job of a process."""

    job: Text = None
    restarts: Integer = None
    cluster: Text = None


class Holder(FileRecord):
    """attempt.json: the process that may write, and the data that shows whether it has ended."""

    token: Text = None
    pid: Integer = None
    host: Text = None
    machine: Text = None  # boot id
    pid_namespace: Integer = None
    began: Text = None  # kernel ticks
    slurm: SlurmRecord | None = None

    @field_validator("slurm", mode="before")
    @classmethod
    def _check_slurm(cls, slurm: Any) -> Any:
        return slurm if isinstance(slurm, dict | SlurmRecord) else None

    def __str__(self) -> str:
        job = f" in Slurm job {self.slurm.job}" if self.slurm and self.slurm.job else ""
        pid, host = "?" if self.pid is None else self.pid, self.host or "?"
        return f"process {pid} on {host}{job}"


class AttemptRecord(Record):
    """A line of attempts.jsonl: the start or the end of an attempt, or a decision of launch.slurm about it."""

    event: str  # started, finished, stopped or failed; of launch.slurm: requeued, left to Slurm, ended or lost
    time: str | None = None
    token: Text = None
    run: Text = None  # the run's identity, the same in all attempts
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
    modules: dict[str, dict[str, str]] | None = None  # file and sha256 of each imported module, by setting

    @property
    def moment(self) -> datetime:
        """When the line was written. Valid only if `time` is set."""
        return datetime.strptime(self.time or "", _TIME)

    @field_validator("time")
    @classmethod
    def _check_time(cls, text: str | None) -> str | None:
        if text is not None:
            datetime.strptime(text, _TIME)
        return text

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: dict[str, Any] | None) -> dict[str, Any] | None:
        if bits and not isinstance(bits.get("versions", {}), dict):
            raise ValueError("versions should be an object")
        return bits


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


def read_attempts(file: Path) -> list[AttemptRecord]:
    """Read attempts.jsonl.

    Raises:
        InputError: the file exists and cannot be read.
    """
    return [record for line in read_objects(file) if (record := parse(line, AttemptRecord))]


def read_saves(file: Path) -> list[SaveRecord]:
    """Read digests.jsonl. Raises InputError as `read_attempts` does."""
    return [record for line in read_objects(file) if (record := parse(line, SaveRecord))]


def parse(line: dict[str, Any], kind: type[R]) -> R | None:
    """Return the line as a record of this type; None if it is damaged."""
    try:
        return kind.model_validate(line)
    except ValidationError:
        return None


def read_objects(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that are JSON objects.

    Raises:
        InputError: the file exists and cannot be read.
    """
    try:
        texts = list(lines_of(file))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; restore access to it, or name another run") from None
    found = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
