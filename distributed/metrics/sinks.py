"""The sinks of a run: metrics.jsonl, TensorBoard and the terminal."""

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Literal

from loguru import logger

from distributed.files import lines_of, storing
from distributed.metrics.event_file import EventFile
from distributed.metrics.records import EpochMetrics, LearnsEnding, LearnsStart, Sink, SplitMetrics, TrainMetrics
from distributed.process.optional_output import OptionalOutput
from distributed.run.claim import ClaimedRun
from distributed.run.metrics_file import EpochRecord, TrainRecord

_SPLITS = ("validation", "test")


class JsonLines:
    """Writes metrics.jsonl: one JSON object per line, `kind` train or epoch.

    Numbers that are not finite, e.g. the norm of an overflowed gradient, are null. A resumed run deletes the lines after
    the step it resumes from. This is the first of a run's sinks: once another attempt has claimed the folder it raises,
    so the sinks after it write nothing either.
    """

    def __init__(self, run: ClaimedRun, *, start_step: int, start_epoch: int, data: str) -> None:
        self.run, self.data = run, data
        with storing(run.metrics_file):
            lines = lines_of(run.metrics_file)
            kept = [line for line in lines if _is_before(line, step=start_step, epoch=start_epoch)]
        run.replace(run.metrics_file, "".join(f"{line}\n" for line in kept))

    def log_step(self, metrics: TrainMetrics) -> None:
        self.run.append(self.run.metrics_file, TrainRecord(kind="train", data=self.data, **asdict(metrics)))
        self.run.progress(step=metrics.step, epoch=metrics.epoch)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        splits = {name: _flat(split) for name in _SPLITS if (split := getattr(metrics, name))}
        self.run.append(self.run.metrics_file, EpochRecord(kind="epoch", data=self.data, **asdict(metrics) | splits))

    def close(self) -> None:
        pass


def _is_before(text: str, *, step: int, epoch: int) -> bool:
    """Whether a run resumed at this step and epoch will not write the line again."""
    try:
        line = json.loads(text)
        return bool(line["step"] <= step and (line["kind"] != "epoch" or line["epoch"] < epoch))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # incomplete: the process was killed while writing it


class TensorBoard:
    """Writes TensorBoard scalars: training, validation and test curves in one folder."""

    def __init__(self, folder: Path, *, start_step: int) -> None:
        self._folder, self._start_step = folder, start_step

    @cached_property
    def _events(self) -> EventFile:
        # Created on first use because its imports are slow. TensorBoard hides the earlier curves after the resumed step.
        return EventFile(self._folder, purge_step=self._start_step + 1)

    def log_step(self, metrics: TrainMetrics) -> None:
        names = ("loss", "accuracy", "lr", "grad_norm", "images_per_second", "data_wait", "memory_mib", "skipped_steps")
        self._events.scalars({f"train/{name}": getattr(metrics, name) for name in names}, metrics.step)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        values = {"epoch/train_loss": metrics.train_loss, "epoch/train_accuracy": metrics.train_accuracy}
        for split in _SPLITS:
            measured = getattr(metrics, split)
            values |= {f"epoch/{split}_{name}": value for name, value in _flat(measured).items()} if measured else {}
        self._events.scalars(values, metrics.step)

    def close(self) -> None:
        if "_events" in self.__dict__:
            self._events.close()


def _flat(split: SplitMetrics) -> dict[str, float]:
    """Return all metrics of a split by name."""
    return {"loss": split.loss, "accuracy": split.accuracy, "accuracy5": split.accuracy5, **split.metrics}


class OptionalSink:
    """A sink that the run does not depend on: its first error is logged as a warning and disables it."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._sink: Sink | None = None
        self._output = OptionalOutput(name)
        self._output.run(lambda: setattr(self, "_sink", make()))

    def log_step(self, metrics: TrainMetrics) -> None:
        self._call(lambda sink: sink.log_step(metrics))

    def log_epoch(self, metrics: EpochMetrics) -> None:
        self._call(lambda sink: sink.log_epoch(metrics))

    def begin(self, step: int) -> None:
        self._call(lambda sink: sink.begin(step) if isinstance(sink, LearnsStart) else None)

    def end(self, status: Literal["finished", "stopped", "failed"]) -> None:
        self._call(lambda sink: sink.end(status) if isinstance(sink, LearnsEnding) else None)

    def close(self) -> None:
        self._call(lambda sink: sink.close())

    def _call(self, method: Callable[[Sink], object]) -> None:
        if (sink := self._sink) is not None:
            self._output.run(lambda: method(sink))


class Terminal:
    """Shows a progress bar on a terminal and log lines elsewhere, and one log line per epoch on both."""

    def __init__(self, *, epochs: int, total_steps: int, start_step: int, step: Callable[[], int]) -> None:
        self.epochs, self.total_steps = epochs, total_steps
        self._bar = _Bar(epochs, total_steps, start_step, step) if sys.stderr.isatty() else None

    def log_step(self, m: TrainMetrics) -> None:
        if self._bar is not None:
            self._bar.show(f"loss {m.loss:.3f}, {m.accuracy:.1%}, {m.images_per_second:,.0f} img/s")
            return
        logger.info(
            "epoch {}/{} step {}/{}: loss {:.4f}, accuracy {:.2%}, lr {:.3g}, {:,.0f} images/s, ETA {}{}",
            m.epoch + 1, self.epochs, m.step, self.total_steps, m.loss, m.accuracy, m.lr, m.images_per_second,
            format_duration(m.eta_seconds), f"; {m.skipped_steps} steps skipped" if m.skipped_steps else "",
        )  # fmt: skip

    def log_epoch(self, m: EpochMetrics) -> None:
        parts = [f"train loss {m.train_loss:.4f}, accuracy {m.train_accuracy:.2%}"]
        for name, split in (("validation", m.validation), ("test", m.test)):
            if split:
                own = "".join(f", {metric} {value:.4f}" for metric, value in split.metrics.items())
                best = ", best so far" if m.is_best and name == "validation" else ""
                parts.append(f"{name} loss {split.loss:.4f}, accuracy {split.accuracy:.2%}{own}{best}")
        logger.info(
            "epoch {}/{} done in {}: {}", m.epoch + 1, self.epochs, format_duration(m.seconds), "; ".join(parts)
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """A progress bar advanced by its own thread, so that it costs the training thread nothing."""

    _REFRESH_SECONDS = 0.2

    def __init__(self, epochs: int, total_steps: int, start_step: int, step: Callable[[], int]) -> None:
        from tqdm import tqdm

        self._epochs, self._total_steps, self._step = epochs, total_steps, step
        self._bar = tqdm(
            total=total_steps, initial=start_step, miniters=1, dynamic_ncols=True, leave=False,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]",
        )  # fmt: skip
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._advance()
        self._thread.start()

    def show(self, text: str) -> None:
        """Set the text behind the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._bar.close()

    def _run(self) -> None:
        while not self._closed.wait(self._REFRESH_SECONDS):
            self._advance()

    def _advance(self) -> None:
        done = self._step()
        epoch = max(0, done - 1) * self._epochs // max(1, self._total_steps) + 1
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.update(done - self._bar.n)


def format_duration(seconds: float) -> str:
    """Format as minutes or hours, e.g. `4:05` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
