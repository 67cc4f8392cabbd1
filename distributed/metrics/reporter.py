"""Turns totals and elapsed time into metrics, and passes them to all sinks."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import torch
from loguru import logger
from torch import Tensor

from distributed.config import TrainConfig
from distributed.metrics.follower import Follower
from distributed.metrics.mlflow_sink import MlflowService
from distributed.metrics.parameters import parameters_of
from distributed.metrics.records import (
    EpochMetrics,
    LearnsEnding,
    LearnsStart,
    Sink,
    SpeedMeter,
    SplitMetrics,
    TrainMetrics,
    peak_memory_mib,
)
from distributed.metrics.sinks import JsonLines, OptionalSink, TensorBoard, Terminal
from distributed.metrics.wandb_sink import WandbService
from distributed.process import exits
from distributed.process.optional_output import one_line
from distributed.run.claim import ClaimedRun
from distributed.training.state import TrainState
from distributed.training.totals import SplitTotals, Totals


class Reporter:
    """The sinks of a run and its speed meter. Context manager that closes the sinks."""

    def __init__(self, sinks: Sequence[Sink], *, total_steps: int, device: torch.device) -> None:
        self.sinks, self.total_steps, self.device = sinks, total_steps, device
        self.meter = SpeedMeter()
        self._epoch_meter = SpeedMeter()
        self._state: TrainState | None = None
        self._samples_at_reading = 0

    def __enter__(self) -> Self:
        self._closing = ExitStack()
        for sink in self.sinks:
            self._closing.callback(sink.close)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        stopped = self._state is not None and self._state.stop_reason is not None
        status = exits.exit_of(error).status if error else "stopped" if stopped else "finished"
        for sink in self.sinks:
            if isinstance(sink, LearnsEnding):
                self._closing.callback(sink.end, status)  # before any sink is closed
        try:
            self._closing.close()
        except (Exception, SystemExit) as failure:
            if error is None:
                raise
            logger.warning("a sink failed at the end: {}", one_line(failure))  # the run's own error is reported

    def begin_epoch(self, state: TrainState) -> None:
        if self._state is None:
            self._state = state
            for sink in self.sinks:
                if isinstance(sink, LearnsStart):
                    sink.begin(state.step)
        self.meter.restart()
        self._samples_at_reading = state.samples_seen
        self._epoch_meter.restart()

    def log_step(self, state: TrainState, window: Totals, *, grad_norm: Tensor, lr: float) -> None:
        """Report the means over the window of steps that ends with this one."""
        norm = float(grad_norm)  # synchronizes with the device, so the clock is read afterwards
        seconds, data_wait = self.meter.read()
        # Not window.count: this process did only some of the steps of a resumed window.
        images_per_second = (state.samples_seen - self._samples_at_reading) / seconds
        self._samples_at_reading = state.samples_seen
        remaining = (self.total_steps - state.step) * (state.samples_seen / max(1, state.step))
        metrics = TrainMetrics(
            epoch=state.epoch, step=state.step, loss=window.mean_loss, accuracy=window.accuracy, lr=lr, grad_norm=norm,
            images_per_second=images_per_second, data_wait=data_wait, memory_mib=peak_memory_mib(self.device),
            eta_seconds=remaining / images_per_second, skipped_steps=window.skipped_steps,
        )  # fmt: skip
        for sink in self.sinks:
            sink.log_step(metrics)

    def log_epoch(
        self, state: TrainState, *, lr: float, validation: SplitTotals | None, test: SplitTotals | None, is_best: bool
    ) -> None:
        """Report the end of an epoch."""
        train = state.epoch_totals
        metrics = EpochMetrics(
            epoch=state.epoch, step=state.step, lr=lr, train_loss=train.mean_loss, train_accuracy=train.accuracy,
            validation=_split(validation), test=_split(test), is_best=is_best, seconds=self._epoch_meter.read().seconds,
        )  # fmt: skip
        for sink in self.sinks:
            sink.log_epoch(metrics)


def _split(totals: SplitTotals | None) -> SplitMetrics | None:
    return None if totals is None else SplitMetrics(totals.mean_loss, totals.accuracy, totals.accuracy5, totals.metrics)


def default_sinks(config: TrainConfig, run: ClaimedRun, state: TrainState, *, total_steps: int) -> list[Sink]:
    """Open the sinks that every run has on rank 0: metrics.jsonl, TensorBoard if configured, and the terminal."""
    start_step = state.step
    lines = JsonLines(run, start_step=start_step, start_epoch=state.epoch, data=config.data.name)
    sinks: list[Sink] = [lines]
    if config.logging.tensorboard:
        sinks.append(OptionalSink(str(run.tensorboard), lambda: TensorBoard(run.tensorboard, start_step=start_step)))
    terminal = OptionalSink(
        "progress on the terminal",
        lambda: Terminal(epochs=config.epochs, total_steps=total_steps, start_step=start_step, step=lambda: state.step),
    )
    return [*sinks, *_services(config, run), terminal]


def _services(config: TrainConfig, run: ClaimedRun) -> list[Sink]:
    """Open the sinks that copy metrics.jsonl to Weights & Biases and to MLflow, if configured."""
    parameters = parameters_of(config)
    sinks: list[Sink] = []
    if wandb := config.logging.wandb:
        make_wandb = partial(WandbService, wandb, run.path, identity=run.identity, parameters=parameters)
        sinks.append(OptionalSink("wandb", lambda: Follower("wandb", run.metrics_file, make_wandb)))
    if mlflow := config.logging.mlflow:
        make_mlflow = partial(MlflowService, mlflow, run.path, identity=run.identity, parameters=parameters)
        sinks.append(OptionalSink("MLflow", lambda: Follower("MLflow", run.metrics_file, make_mlflow)))
    return sinks
