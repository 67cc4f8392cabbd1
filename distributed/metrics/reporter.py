"""Turns sums and the clock into metrics and tells them to all sinks."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from distributed.config import TrainConfig
from distributed.metrics.records import EpochMetrics, Meter, Sink, SplitMetrics, TrainMetrics, memory_mib
from distributed.metrics.sinks import BestEffort, JsonLines, TensorBoard, Terminal
from distributed.run.claim import ClaimedRun
from distributed.training.state import TrainState
from distributed.training.totals import Totals


class Reporter:
    """The sinks of a run and the meter of its speed; a context that closes them."""

    def __init__(self, sinks: Sequence[Sink], *, total_steps: int, device: torch.device) -> None:
        self.sinks, self.total_steps, self.device = sinks, total_steps, device
        self.meter = Meter()
        self._epoch_meter = Meter()
        self._samples_at_reading = 0

    def __enter__(self) -> Self:
        self._closing = ExitStack()
        for sink in self.sinks:
            self._closing.callback(sink.close)
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._closing.close()

    def epoch_begins(self, state: TrainState) -> None:
        self.meter.restart()
        self._samples_at_reading = state.samples_seen
        self._epoch_meter.restart()

    def train(self, state: TrainState, window: Totals, *, grad_norm: Tensor, lr: float) -> None:
        """A logging step: the means over the window of steps that ends with it."""
        norm = float(grad_norm)  # waits for the device, so the clock is read after it
        seconds, waited = self.meter.read()
        # Not the window's count: of a resumed window this process did but a part.
        images_per_second = (state.samples_seen - self._samples_at_reading) / seconds
        self._samples_at_reading = state.samples_seen
        remaining = (self.total_steps - state.step) * (state.samples_seen / max(1, state.step))
        metrics = TrainMetrics(
            epoch=state.epoch, step=state.step, loss=window.mean_loss, accuracy=window.accuracy, lr=lr, grad_norm=norm,
            images_per_second=images_per_second, data_wait=waited, memory_mib=memory_mib(self.device),
            eta_seconds=remaining / images_per_second, skipped_steps=window.skipped_steps,
        )  # fmt: skip
        for sink in self.sinks:
            sink.train(metrics)

    def epoch(
        self, state: TrainState, *, lr: float, validation: Totals | None, test: Totals | None, is_best: bool
    ) -> None:
        """The end of an epoch."""
        train = state.epoch_totals
        metrics = EpochMetrics(
            epoch=state.epoch, step=state.step, lr=lr, train_loss=train.mean_loss, train_accuracy=train.accuracy,
            validation=_split(validation), test=_split(test), is_best=is_best, seconds=self._epoch_meter.read()[0],
        )  # fmt: skip
        for sink in self.sinks:
            sink.epoch(metrics)


def _split(totals: Totals | None) -> SplitMetrics | None:
    return None if totals is None else SplitMetrics(totals.mean_loss, totals.accuracy, totals.accuracy5)


def open_sinks(config: TrainConfig, run: ClaimedRun, state: TrainState, *, total_steps: int) -> list[Sink]:
    """The sinks that every run has on rank 0, told where it starts."""
    start_step = state.step
    lines = JsonLines(run, start_step=start_step, start_epoch=state.epoch, data=config.data.name)
    sinks: list[Sink] = [lines]
    if config.logging.tensorboard:
        sinks.append(BestEffort(str(run.tensorboard), lambda: TensorBoard(run.tensorboard, start_step=start_step)))
    terminal = BestEffort(
        "progress on the terminal",
        lambda: Terminal(epochs=config.epochs, total_steps=total_steps, start_step=start_step, step=lambda: state.step),
    )
    return [*sinks, terminal]
