"""A process that ends at once writes the ending of a run that was begun, and nothing of one that was not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit.small_runs import small_config

from distributed.attempt import Attempt
from distributed.comm.peers import in_words
from distributed.config import TrainConfig
from distributed.errors import ExitCode, InputError
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.process import endings
from distributed.process.endings import Ending
from distributed.run_process import run_to_exit_code
from distributed.topology import Topology
from distributed.training.state import TrainState
from distributed.training.stop import StopSource


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_config(tmp_path / "run")


@pytest.fixture
def attempt(config: TrainConfig) -> Iterator[Attempt]:
    with Attempt(config, Topology()) as attempt:
        yield attempt
        attempt.run = None  # as in a process that has gone, nothing is written on the way out


def begin(attempt: Attempt, config: TrainConfig) -> None:
    state = TrainState(build_schedule(config, steps_per_epoch=3), build_early_stopping(config.early_stopping))
    attempt.begin(state, resumed_from=None, metadata=attempt.metadata(torch.device("cpu")) | {"images": {}})


def end_at_once(code: ExitCode, reason: str) -> None:
    for word in list(endings._last_words):
        word(Ending(code, reason))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ExitCode.STOPPED, "stopped"),
        (ExitCode.INTERRUPTED, "stopped"),
        (ExitCode.FAILED, "failed"),
        (ExitCode.BAD_INPUT, "failed"),
    ],
)
def test_a_run_that_was_begun_says_how_it_ended(attempt: Attempt, config: TrainConfig, code: ExitCode, status: str):
    begin(attempt, config)
    assert attempt.folder.status()["status"] == "running"
    end_at_once(code, "the reason")
    found = attempt.folder.status()
    assert (found["status"], found["exit_code"], found["reason"], found["step"]) == (status, code, "the reason", 0)
    lines = [json.loads(line) for line in attempt.folder.attempts_file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", status]


def test_before_its_beginning_the_last_status_stays(attempt: Attempt):
    before = '{"status": "stopped", "exit_code": 75, "step": 7}'
    (attempt.folder.path / "status.json").write_text(before)
    end_at_once(ExitCode.STOPPED, "the reason")
    assert (attempt.folder.path / "status.json").read_text() == before
    assert not attempt.folder.attempts_file.exists()


def test_an_attempt_that_has_ended_has_no_last_word(config: TrainConfig):
    before = list(endings._last_words)
    with Attempt(config, Topology()):
        assert len(endings._last_words) == len(before) + 1
    assert endings._last_words == before


@pytest.mark.parametrize(("is_cause", "later"), [(True, 0), (False, 1)])
def test_torchrun_is_given_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cause: bool, later: int):
    file = tmp_path / "attempt_0" / "0" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr("distributed.process.endings.time.time", lambda: 1000.7)
    endings.report("one line", is_cause=is_cause)
    assert json.loads(file.read_text()) == {
        "message": {"message": "one line", "extraInfo": {"timestamp": str(1000 + later)}}
    }


def test_a_reason_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/null/error.json")
    endings.report("one line", is_cause=True)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    endings.report("one line", is_cause=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("one", "two"), "one; two"),
        (ValueError("a defect"), "ValueError: a defect"),
        (KeyError("name"), "KeyError: 'name'"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_an_error_in_one_line(error: Exception, words: str):
    assert in_words(error) == words


class Ask:
    def requested(self) -> str:
        return "SIGTERM"


class Fail:
    def requested(self) -> None:
        raise ValueError("a defect")


@pytest.mark.parametrize(
    ("stop", "code", "reason"),
    [
        (Ask(), 75, "stopped by SIGTERM at step 2, everything saved; the same command resumes"),
        (Fail(), 1, "ValueError: a defect"),
    ],
)
def test_every_ending_has_its_code_and_reason(
    config: TrainConfig, stop: StopSource, code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run_to_exit_code(config, Topology(), stop) == code
    assert json.loads(file.read_text())["message"]["message"] == reason
