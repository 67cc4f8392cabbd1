"""The result of training: how the attempt ended, and the run's network, metrics and history."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from torch import nn

from distributed.config import TrainConfig
from distributed.inference.trained_run import TrainedRun, load_checkpoint
from distributed.models.imported import GivenModel
from distributed.run.checkpoint_layout import name_of
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import EpochRecord, read_epochs
from distributed.training.state import Best, TrainState


@dataclass(frozen=True)
class TrainResult:
    """How an attempt at a run ended, the same on all ranks.

    The network and the metrics are read from the run folder when they are first used, on any rank.

    Attributes:
        config: the config, with the import paths of what was given as an object.
        step, epoch: number of steps and epochs trained, over all attempts.
        stop_reason: why the run was stopped before its end; None if it is finished.
        stopped_early: whether early stopping ended the run.
        best: the best validation epoch, if `checkpoint.best_by` chooses one.
        state: everything except tensors that the final checkpoint holds: counters, schedule and totals.
    """

    config: TrainConfig
    step: int
    epoch: int
    stop_reason: str | None
    stopped_early: bool
    best: Best | None
    state: TrainState = field(repr=False)
    _given: GivenModel | None = field(repr=False)

    @classmethod
    def of(cls, config: TrainConfig, state: TrainState, model: GivenModel | None) -> Self:
        """Return the result of an attempt that has saved this state."""
        return cls(config, state.step, state.epoch, state.stop_reason, state.stopped_early, state.best, state, model)

    @property
    def checkpoint(self) -> Path:
        """The folder of the final checkpoint."""
        return RunFolder(self.config.run_dir).checkpoints / name_of(step=self.step, epoch=self.epoch)

    @cached_property
    def trained(self) -> TrainedRun:
        """The network with its preprocessing and class names, as `load` returns it, with the final weights.

        Raises:
            InputError: the checkpoint has been deleted since, e.g. by another attempt at the run.
        """
        return load_checkpoint(self.config, self.checkpoint, model=self._given)

    @property
    def network(self) -> nn.Module:
        """The network with the final weights (EMA weights if there are any), in evaluation mode, on the CPU in float32."""
        return self.trained.network

    @cached_property
    def history(self) -> list[EpochRecord]:
        """One record per epoch trained, earlier attempts included."""
        epochs = read_epochs(RunFolder(self.config.run_dir).metrics_file)
        return [record for record in epochs if record.step <= self.step and record.epoch < self.epoch]

    @property
    def metrics(self) -> EpochRecord | None:
        """The record of the last epoch; None if the run was stopped before the end of its first."""
        return self.history[-1] if self.history else None
