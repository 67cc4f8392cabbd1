"""The record of one run. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from distributed.experiments.catalogue import Kind

Device = Literal["cpu", "gpu"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CurvePoint(_Record):
    """The accuracies after an epoch, in per cent, and the minutes of training and evaluation until then."""

    epoch: int
    minutes: float
    train: float | None
    validation: float | None
    test: float | None


class Machine(_Record):
    """What a run ran on: the name of the processor or card, and the number of CPU cores that the run could use."""

    kind: Device
    device: str
    cores: int | None


class Result(_Record):
    """Progress and results of a run, in per cent: at its best validation epoch, or at its last one without validation.

    None stands for a figure that was not measured or recorded.

    Args:
        config: path of the config that the run started from.
        settings: what the run sets otherwise than its config, sorted, as on the command line.
        of_epochs: epochs that the catalogue plans.
        at_epoch: the epoch of the accuracies.
        minutes: wall time of training and evaluation.
        processes: number of processes; of several attempts e.g. `1 then 2`.
        exact_shards: shards in exact mode; 0: fast mode.
        revision: commit of the code, with `+changes` if files were modified.
        command: repeats the run.
    """

    id: str
    kind: Kind
    config: str
    settings: tuple[str, ...]
    seed: int
    model: str
    data: str
    validation: float | None
    test: float | None
    test_loss: float | None
    train: float | None
    minutes: float
    epochs: int
    of_epochs: int
    ended_early: bool
    at_epoch: int
    attempts: int
    processes: str
    machine: Machine
    precision: str
    exact_shards: int
    versions: dict[str, str]
    date: str
    revision: str | None
    command: str
    curve: tuple[CurvePoint, ...] | None

    @model_validator(mode="after")
    def _check_settings(self) -> "Result":
        if list(self.settings) != sorted(self.settings):
            raise ValueError("settings should be sorted")
        return self

    @property
    def key(self) -> tuple[str, int, Device, tuple[str, ...]]:
        """What a run repeats. Of runs with the same key, only one is recorded."""
        return self.id, self.seed, self.machine.kind, self.settings

    @property
    def progress(self) -> int:
        """Finished epochs, or all planned ones after early stopping."""
        return self.of_epochs if self.ended_early else self.epochs

    @property
    def is_complete(self) -> bool:
        return self.progress >= self.of_epochs
