import fcntl
import json
import logging
import math
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from distributed.metrics.event_file import EventFile
from distributed.metrics.records import EpochMetrics, SplitMetrics, TrainMetrics
from distributed.metrics.sinks import JsonLines, Terminal, format_duration
from distributed.process.logs import terminal_logs
from distributed.run.claim import ClaimedRun
from distributed.run.metrics_log import MetricsLog, Point

TRAIN = TrainMetrics(
    epoch=0, step=5, loss=1.5, accuracy=0.5, lr=0.1, grad_norm=2.0, images_per_second=100.0, data_wait=0.01,
    memory_mib=10.0, eta_seconds=60.0,
)  # fmt: skip
EPOCH = EpochMetrics(
    epoch=0, step=10, lr=0.1, train_loss=1.4, train_accuracy=0.5, validation=SplitMetrics(1.3, 0.6, 0.9), test=None,
    is_best=True, seconds=3.0,
)  # fmt: skip


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ClaimedRun]:
    claimed = ClaimedRun.claim(tmp_path / "run", world_size=1)
    yield claimed
    claimed.release()


def log_steps(run: ClaimedRun, *steps: int, start_step: int = 0) -> None:
    sink = JsonLines(run, start_step=start_step, start_epoch=1, data="generated10")
    for step in steps:
        sink.log_step(replace(TRAIN, step=step))
    sink.close()


def steps_of(file: Path) -> list[int]:
    return [line["step"] for line in lines_of(file)]


def test_each_line_names_its_kind_and_data(run):
    sink = JsonLines(run, start_step=0, start_epoch=0, data="generated10")
    sink.log_step(TRAIN)
    sink.log_epoch(EPOCH)
    train, epoch = lines_of(run.metrics_file)
    assert train == {"kind": "train", "data": "generated10"} | asdict(TRAIN)
    validation = {"loss": 1.3, "accuracy": 0.6, "accuracy5": 0.9}
    assert epoch == {"kind": "epoch", "data": "generated10"} | asdict(EPOCH) | {"validation": validation}


def test_the_best_epoch_is_marked_after_its_validation_accuracy():
    lines = list[str]()
    sink = logger.add(lines.append, format="{message}")
    try:
        Terminal(epochs=2, total_steps=20, start_step=0, step=lambda: 10).log_epoch(
            replace(EPOCH, test=EPOCH.validation)
        )
    finally:
        logger.remove(sink)
    [line] = lines
    assert "; validation loss 1.3000, accuracy 60.00%, best so far; test loss 1.3000, accuracy 60.00%\n" in line


def test_further_metrics_stand_beside_the_others(run):
    measured = SplitMetrics(1.3, 0.6, 0.9, {"brier": 0.25, "of_nan": math.nan})
    sink = JsonLines(run, start_step=0, start_epoch=0, data="generated10")
    sink.log_epoch(replace(EPOCH, validation=measured, test=measured))
    text = run.metrics_file.read_text()
    assert "NaN" not in text, "that would be no JSON"
    (epoch,) = lines_of(run.metrics_file)
    assert epoch["test"] == {"loss": 1.3, "accuracy": 0.6, "accuracy5": 0.9, "brier": 0.25, "of_nan": None}
    log = MetricsLog.read(run.metrics_file)
    assert log.further_metrics == ["brier", "of_nan"]
    assert (log.last("test", "brier"), log.last("test", "of_nan")) == (Point(1, 0.25), None)


def test_an_overflow_is_written_as_valid_json(run):
    sink = JsonLines(run, start_step=0, start_epoch=0, data="generated10")
    sink.log_step(replace(TRAIN, grad_norm=math.inf, skipped_steps=1))
    line = json.loads(run.metrics_file.read_text(), parse_constant=pytest.fail)
    assert (line["grad_norm"], line["skipped_steps"]) == (None, 1)


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (4, []), (5, [5]), (12, [5, 10]), (15, [5, 10, 15])])
def test_a_resume_deletes_the_lines_after_its_step(run, start_step, kept):
    log_steps(run, 5, 10, 15)
    log_steps(run, start_step=start_step)
    assert steps_of(run.metrics_file) == kept


def test_a_resumed_run_leaves_the_lines_of_an_undisturbed_one(run):
    log_steps(run, 5, 10, 15, 20)
    undisturbed = lines_of(run.metrics_file)
    log_steps(run, 5, 10, 15)
    log_steps(run, 15, 20, start_step=12)
    assert lines_of(run.metrics_file) == undisturbed


def test_an_epoch_that_was_not_saved_is_logged_again(run):
    for start_epoch, kept in ((1, [0]), (0, [])):
        sink = JsonLines(run, start_step=0, start_epoch=0, data="generated10")
        sink.log_epoch(EPOCH)
        JsonLines(run, start_step=EPOCH.step, start_epoch=start_epoch, data="generated10")
        assert [line["epoch"] for line in lines_of(run.metrics_file)] == kept


@pytest.mark.parametrize("missing", [1, 20, 100])
def test_an_incomplete_line_is_dropped(run, missing):
    file = run.metrics_file
    log_steps(run, 5, 10)
    file.write_bytes(file.read_bytes()[:-missing])
    log_steps(run, 15, start_step=10)
    assert steps_of(file) == ([5, 10, 15] if missing == 1 else [5, 15])


@pytest.mark.parametrize("garbage", ["\0\0\0", '{"step": "x"}', "{}", '{"step": 3'])
def test_a_line_without_a_step_is_dropped(run, garbage):
    file = run.metrics_file
    log_steps(run, 5)
    file.write_text(f"{garbage}\n{file.read_text()}")
    log_steps(run, start_step=10)
    assert steps_of(file) == [5]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3599.7, "1:00:00"), (3723, "1:02:03")]
)
def test_durations_are_formatted_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_advances_at_every_step_and_is_legible(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    step = 0
    with os.fdopen(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = Terminal(epochs=10, total_steps=4000, start_step=0, step=lambda: step)
        for step in (3, 8, 9):
            if step == 8:
                bar.log_step(replace(TRAIN, step=8, images_per_second=12345.6))
            time.sleep(0.3)
        bar.close()
        drawn = os.read(reading, 2**16).decode()
    os.close(reading)
    lines = [line.strip() for line in drawn.split("\r") if line.strip()]
    assert [int(line.partition("/4000")[0].rpartition(" ")[2]) for line in lines][-3:] == [3, 8, 9]
    assert re.fullmatch(r"epoch 1/10 \|.{10,}\| 9/4000 \[[0-9:]+, loss 1\.500, 50\.0%, 12,346 img/s\]", lines[-1]), (
        lines
    )
    assert all(len(line) <= columns for line in lines)


def test_tensorboard_shows_a_resume_on_a_slow_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It reads files sorted by name, and the second one hides what the first has from its step on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now = time.time()
    for first, seconds in ((1, now), (11, now - 3600)):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
        events = EventFile(tmp_path, purge_step=first)
        for step in range(first, 21, 5):
            events.scalars({"loss": float(first)}, step)
        events.close()
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [(1, 1.0), (6, 1.0), (11, 11.0), (16, 11.0)]


def test_a_wrong_message_of_a_library_ends_nothing(capsys: pytest.CaptureFixture[str]):
    terminal_logs(0)
    try:
        logging.getLogger("library").warning("%d images", "many")
        logging.getLogger("library").warning("still here")
    finally:
        logger.remove()
    assert "library: still here" in capsys.readouterr().err
