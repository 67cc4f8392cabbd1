"""Copying metrics.jsonl to a service that blocks, fails, refuses or has some of it already."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from kit.speed import slowness
from loguru import logger

from distributed.errors import ExitCode
from distributed.metrics import follower
from distributed.metrics.follower import Follower, Logged, RefusedError, Status, values_of
from distributed.process import exits
from distributed.run.metrics_file import MetricsRecord, parse_metrics
from unit.test_sinks import EPOCH, TRAIN


class Ledger:
    """A service that keeps what it is given, on this machine."""

    def __init__(self, logged: Logged = Logged()) -> None:  # noqa: B008
        self.logged, self.steps, self.epochs = logged, list[int](), list[int]()
        self.status: Status | None = None
        self.fails = 0
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def start(self) -> Logged:
        return self.logged

    def log(self, records: Sequence[MetricsRecord]) -> None:
        self.entered.set()
        self.go_on.wait()
        if self.fails:
            self.fails -= 1
            raise ConnectionError("http://user:hidden@host: refused")
        self.steps += [r.step for r in records if r.kind == "train"]
        self.epochs += [r.epoch for r in records if r.kind == "epoch"]

    def finish(self, status: Status) -> None:
        self.status = status


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    return path


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handle = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(handle)


def write(file: Path, *steps: int, epoch: int | None = None) -> None:
    with file.open("a") as lines:
        for step in steps:
            lines.write(json.dumps({"kind": "train", **asdict(replace(TRAIN, step=step))}) + "\n")
        if epoch is not None:
            lines.write(json.dumps({"kind": "epoch", **asdict(replace(EPOCH, epoch=epoch))}) + "\n")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20 * slowness()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_are_copied_while_the_run_goes_on(file, warnings):
    ledger = Ledger()
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1, 2)
    sink.log_step(TRAIN)
    wait_until(lambda: ledger.steps == [1, 2])
    write(file, 3, epoch=0)
    sink.end("finished")
    sink.close()
    assert (ledger.steps, ledger.epochs, ledger.status) == ([1, 2, 3], [0], "finished")
    assert warnings == []


def test_a_step_is_logged_while_the_service_blocks(file, warnings, monkeypatch):
    monkeypatch.setitem(follower.CLOSE_SECONDS, "stopped", 0.2)
    ledger = Ledger()
    ledger.go_on.clear()
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1)
    sink.log_step(TRAIN)
    assert ledger.entered.wait(20 * slowness())
    for step in range(2, 200):  # each would hang here
        write(file, step)
        sink.log_step(replace(TRAIN, step=step))
    sink.log_epoch(EPOCH)
    assert ledger.steps == []
    sink.end("stopped")
    sink.close()
    assert ledger.steps == []
    assert warnings == ["ledger: no answer within 0.2 s at the end of the run; metrics.jsonl has the rest\n"]
    ledger.go_on.set()  # ends the thread
    wait_until(lambda: ledger.status == "stopped")
    assert ledger.steps == list(range(1, 200))


def test_after_an_outage_everything_is_sent_once(file, warnings, monkeypatch):
    monkeypatch.setattr(follower, "RETRY_SECONDS", 0.05)
    ledger = Ledger()
    ledger.fails = 3
    sink = Follower("ledger", file, lambda: ledger)
    for step in range(1, 130):
        write(file, step)
        sink.log_step(TRAIN)
    wait_until(lambda: len(ledger.steps) == 129)
    sink.end("finished")
    sink.close()
    assert ledger.steps == list(range(1, 130))
    assert warnings == [
        "ledger: ConnectionError: http://***@host: refused; training continues, and it is tried again\n"
    ]


def test_a_service_that_exits_is_tried_again(file, warnings, monkeypatch):
    """wandb calls sys.exit if its own process has died, and a thread ends without a word then."""
    monkeypatch.setattr(follower, "RETRY_SECONDS", 0.05)
    exits = iter(("start", "log"))

    class Exiting(Ledger):
        def start(self) -> Logged:
            if next(exits, "") == "start":
                sys.exit(-9)
            return super().start()

        def log(self, records: Sequence[MetricsRecord]) -> None:
            if next(exits, "") == "log":
                sys.exit(-9)
            super().log(records)

    ledger = Exiting()
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1)
    sink.log_step(TRAIN)
    wait_until(lambda: ledger.steps == [1])
    sink.end("finished")
    sink.close()
    assert warnings == ["ledger: SystemExit: -9; training continues, and it is tried again\n"]


def test_a_service_that_cannot_start_is_tried_again(file, warnings, monkeypatch):
    monkeypatch.setattr(follower, "RETRY_SECONDS", 0.05)
    ledger, tries = Ledger(), []

    def make() -> Ledger:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(111, "Connection refused")
        return ledger

    sink = Follower("ledger", file, make)
    write(file, 1)
    wait_until(lambda: ledger.steps == [1])
    sink.end("finished")
    sink.close()
    assert (len(tries), len(warnings), ledger.status) == (4, 1, "finished")


def test_an_outage_at_the_end_is_one_warning(file, warnings):
    ledger = Ledger()
    ledger.fails = 10**6
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1)
    sink.end("finished")
    sink.close()
    assert not sink._thread.is_alive()
    assert len(warnings) == 1


def test_a_refusal_ends_it(file, warnings):
    class Refuses(Ledger):
        def start(self) -> Logged:
            raise RefusedError("wrong password; continuing without it")

    sink = Follower("ledger", file, Refuses)
    write(file, 1)
    wait_until(lambda: not sink._thread.is_alive())
    sink.log_step(TRAIN)
    sink.end("finished")
    sink.close()
    assert warnings == ["ledger: wrong password; continuing without it\n"]


@pytest.mark.parametrize(
    ("logged", "steps", "epochs"),
    [
        (Logged(), [5, 10, 15], [0, 1]),
        (Logged(10, 1), [15], [1]),
        (Logged(10, 0), [15], [0, 1]),  # killed between a step and the end of its epoch
        (Logged(20, 2), [], []),
    ],
)
def test_a_resume_sends_what_is_missing_there(file, logged, steps, epochs):
    write(file, 5, 10, epoch=0)
    write(file, 15, epoch=1)
    ledger = Ledger(logged)
    sink = Follower("ledger", file, lambda: ledger)
    sink.end("finished")
    sink.close()
    assert (ledger.steps, ledger.epochs) == (steps, epochs)


def test_half_a_line_waits_for_its_end(file):
    ledger = Ledger()
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1)
    line = file.read_text()
    with file.open("a") as lines:
        lines.write(line[:20])
    sink.log_step(TRAIN)
    wait_until(lambda: ledger.steps == [1])
    with file.open("a") as lines:
        lines.write(line[20:])
    sink.end("failed")
    sink.close()
    assert (ledger.steps, ledger.status) == ([1, 1], "failed")


def test_damaged_lines_are_skipped(file):
    file.write_text('\0\0\n[1]\n{"kind": "train"}\n{"step": 1e999}\n')
    write(file, 1)
    ledger = Ledger()
    sink = Follower("ledger", file, lambda: ledger)
    sink.end("finished")
    sink.close()
    assert ledger.steps == [1]


def test_the_lines_are_those_of_this_attempt(file, tmp_path):
    ledger = Ledger()
    ledger.go_on.clear()
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1)
    sink.log_step(TRAIN)
    assert ledger.entered.wait(20 * slowness())
    (tmp_path / "new").write_text(file.read_text().replace('"step": 1', '"step": 7'))
    (tmp_path / "new").replace(file)  # as an attempt that has taken over the run folder does
    ledger.go_on.set()
    sink.end("failed")
    sink.close()
    assert ledger.steps == [1]


def test_an_immediate_exit_records_its_status(file):
    ledger = Ledger()
    sink = Follower("ledger", file, lambda: ledger)
    write(file, 1)
    sink._exit(exits.Exit(ExitCode.STOPPED, "a test"))
    assert (ledger.steps, ledger.status) == ([1], "stopped")
    sink.close()
    assert sink._exit not in exits._hooks


def test_names_of_the_metrics():
    train = parse_metrics(json.dumps({"kind": "train", **asdict(TRAIN), "loss": None}).encode())
    epoch = parse_metrics(json.dumps({"kind": "epoch", **asdict(EPOCH)}).encode())
    own = json.dumps({"kind": "epoch", **asdict(EPOCH), "test": {"loss": 1.0, "metrics": {"top3": 0.5}}}).encode()
    assert values_of(parse_metrics(own)).items() >= {"test/loss": 1.0, "test/top3": 0.5}.items()
    assert train is not None
    assert epoch is not None
    assert values_of(train) == {
        "train/accuracy": 0.5, "train/lr": 0.1, "train/grad_norm": 2.0, "train/images_per_second": 100.0,
        "train/data_wait": 0.01, "train/memory_mib": 10.0, "train/skipped_steps": 0.0,
    }  # fmt: skip
    assert values_of(epoch) == {
        "epoch": 1.0, "epoch/lr": 0.1, "epoch/train_loss": 1.4, "epoch/train_accuracy": 0.5, "epoch/seconds": 3.0,
        "validation/loss": 1.3, "validation/accuracy": 0.6, "validation/accuracy5": 0.9,
    }  # fmt: skip
