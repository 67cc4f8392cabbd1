"""Turns totals and elapsed time into metrics, and passes them to all sinks."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from distributed.config import TrainConfig
from distributed.metrics.records import EpochMetrics, Sink, SpeedMeter, SplitMetrics, TrainMetrics, peak_memory_mib
from distributed.metrics.sinks import JsonLines, OptionalSink, TensorBoard, Terminal
from distributed.run.claim import ClaimedRun
from distributed.training.state import TrainState
from distributed.training.totals import SplitTotals, Totals


class Reporter:
    """The sinks of a run and its speed meter. Context manager that closes the sinks."""

    def __init__(self, sinks: Sequence[Sink], *, total_steps: int, device: torch.device) -> None:
        self.sinks, self.total_steps, self.device = sinks, total_steps, device
        self.meter = SpeedMeter()
        self._epoch_meter = SpeedMeter()
        self._samples_at_reading = 0

    def __enter__(self) -> Self:
        self._closing = ExitStack()
        for sink in self.sinks:
            self._closing.callback(sink.close)
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._closing.close()

    def begin_epoch(self, state: TrainState) -> None:
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
    return [*sinks, terminal]
