"""An immediate exit is recorded in the run folder, but only if the attempt has started."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch
from kit.commands import ROOT
from kit.small_runs import Recorder, small_config
from loguru import logger

from distributed.attempt import Attempt
from distributed.comm.peers import failure_message
from distributed.config import TrainConfig, with_values
from distributed.engine.protocol import Engine
from distributed.errors import ExitCode, InputError, NotFiniteError, PeerError
from distributed.metrics.reporter import Reporter
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.process import exits
from distributed.process.exits import Exit
from distributed.process.signals import SignalStop
from distributed.run.claim import ClaimedRun
from distributed.run_process import _log_error, run_to_exit_code
from distributed.topology import Topology
from distributed.training.state import TrainState


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small_config(tmp_path / "run")


@pytest.fixture
def attempt(config: TrainConfig) -> Iterator[Attempt]:
    with Attempt(config, Topology()) as attempt:
        yield attempt
        attempt.run = None  # a process that has exited writes nothing more


def begin(attempt: Attempt, config: TrainConfig) -> None:
    state = TrainState(build_schedule(config, steps_per_epoch=3), build_early_stopping(config.early_stopping))
    attempt.begin(
        state, resumed_from=None, metadata=attempt.metadata(torch.device("cpu"), cast("Engine", None)) | {"images": {}}
    )


def run_exit_hooks(code: ExitCode, reason: str) -> None:
    for hook in list(exits._hooks):
        hook(Exit(code, reason))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ExitCode.STOPPED, "stopped"),
        (ExitCode.INTERRUPTED, "stopped"),
        (ExitCode.FAILED, "failed"),
        (ExitCode.BAD_INPUT, "failed"),
    ],
)
def test_exit_is_recorded_in_status_and_attempts(attempt: Attempt, config: TrainConfig, code: ExitCode, status: str):
    begin(attempt, config)
    assert attempt.folder.status().status == "running"
    run_exit_hooks(code, "the reason")
    found = attempt.folder.status()
    assert (found.status, found.exit_code, found.reason, found.step) == (status, code, "the reason", 0)
    lines = [json.loads(line) for line in attempt.folder.attempts_file.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", status]


def test_exit_before_the_start_keeps_the_old_status(attempt: Attempt):
    before = '{"status": "stopped", "exit_code": 75, "step": 7}'
    (attempt.folder.path / "status.json").write_text(before)
    run_exit_hooks(ExitCode.STOPPED, "the reason")
    assert (attempt.folder.path / "status.json").read_text() == before
    assert not attempt.folder.attempts_file.exists()


@pytest.mark.parametrize("is_sudden", [False, True])
def test_a_save_in_progress_is_finished_when_another_rank_fails(config: TrainConfig, is_sudden: bool):
    attempt = Attempt(config, Topology()).__enter__()
    begin(attempt, config)
    assert attempt.run

    def save(run: ClaimedRun) -> None:
        time.sleep(1)
        run.saved(step=7, epoch=0)

    with ThreadPoolExecutor() as thread:
        attempt.run.save_in_progress = thread.submit(save, attempt.run)
        if is_sudden:
            for hook in list(exits._hooks):
                hook(Exit(ExitCode.FAILED, "rank 1 has died", finishes_save=True))
            attempt.run = None
        error = PeerError("rank 1 has died", exit_code=ExitCode.FAILED)
        attempt.__exit__(PeerError, error, None)
    found = attempt.folder.status()
    assert (found.status, found.saved_step) == ("failed", 7)


EXITS_TWICE = """
import threading, time
from distributed.errors import ExitCode
from distributed.process import exits
exits.add_exit_hook(lambda final: time.sleep(2))
first = threading.Thread(target=exits.exit_now, args=(ExitCode.INTERRUPTED, "the first"))
first.start()
time.sleep(0.5)
exits.exit_now(ExitCode.INTERRUPTED, "the second", finishes_save=%s)
"""


@pytest.mark.parametrize(("is_watching_thread", "printed"), [(True, "the first\n"), (False, "")])
def test_only_a_second_ctrl_c_cuts_an_exit_short(is_watching_thread: bool, printed: str):
    """The watching thread may find this rank's own Ctrl-C published, and waits for the exit in progress."""
    code = EXITS_TWICE % is_watching_thread
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, printed)


def test_finished_attempt_removes_its_exit_hook(config: TrainConfig):
    before = list(exits._hooks)
    with Attempt(config, Topology()):
        assert len(exits._hooks) == len(before) + 1
    assert exits._hooks == before


def test_the_program_may_remove_all_log_handlers(config: TrainConfig):
    with Attempt(config, Topology()) as attempt:
        config.run_dir.mkdir(exist_ok=True)
        attempt.open_log()
        logger.remove()


class Exiting:
    """A sink that ends the program with exit code 0."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        pass

    def log_step(self, metrics: object) -> None:
        sys.exit()

    def log_epoch(self, metrics: object) -> None: ...

    def close(self) -> None: ...


@pytest.mark.usefixtures("restore_threads_and_log")
def test_a_run_that_a_sink_ended_is_not_finished(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "exiting", sys.modules[__name__])
    config = with_values(config, logging=config.logging.model_copy(update={"sinks": ("exiting:Exiting",)}))
    with SignalStop(launched=False) as stop:
        assert run_to_exit_code(config, Topology(), stop) == ExitCode.FAILED
    assert json.loads((config.run_dir / "status.json").read_text())["exit_code"] == 1


@pytest.mark.parametrize("failure", [ConnectionError("gone"), SystemExit()], ids=repr)
def test_a_sink_that_fails_at_the_end_hides_no_error(failure: BaseException):
    class Failing(Recorder):
        def close(self) -> None:
            raise failure

    def reporting(*errors: Exception) -> None:
        with Reporter([Failing()], total_steps=1, device=torch.device("cpu")):
            for error in errors:
                raise error

    with pytest.raises(NotFiniteError):
        reporting(NotFiniteError("the loss is NaN"))
    with pytest.raises(type(failure)):
        reporting()


def test_a_full_gpu_is_one_line(capsys: pytest.CaptureFixture[str]):
    messages: list[str] = []
    handle = logger.add(messages.append, format="{message}")
    _log_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Topology(rank=1, world_size=2))
    logger.remove(handle)
    (line,) = "".join(messages).splitlines()
    assert line.startswith(
        "rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB; raise grad_accum_steps"
    )


@pytest.mark.parametrize(("is_cause", "later"), [(True, 0), (False, 1)])
def test_reason_is_written_to_torchruns_error_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cause: bool, later: int
):
    file = tmp_path / "attempt_0" / "0" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr("distributed.process.exits.time.time", lambda: 1000.7)
    exits.write_error_file("one line", is_cause=is_cause)
    assert json.loads(file.read_text()) == {
        "message": {"message": "one line", "extraInfo": {"timestamp": str(1000 + later)}}
    }


def test_unwritable_error_file_is_ignored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/null/error.json")
    exits.write_error_file("one line", is_cause=True)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    exits.write_error_file("one line", is_cause=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("one", "two"), "one; two"),
        (ValueError("a bug"), "ValueError: a bug"),
        (KeyError("name"), "KeyError: 'name'"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_failure_message_is_one_line(error: Exception, message: str):
    assert failure_message(error) == message


class StopNow(SignalStop):
    def requested(self) -> str:
        return "SIGTERM"


class Fail(SignalStop):
    def requested(self) -> None:
        raise ValueError("a bug")


@pytest.mark.parametrize(
    ("stop", "code", "reason"),
    [
        (StopNow(launched=False), 75, "stopped by SIGTERM at step 2, everything saved; the same command resumes"),
        (Fail(launched=False), 1, "ValueError: a bug"),
    ],
)
def test_run_returns_exit_code_and_writes_reason(
    config: TrainConfig, stop: SignalStop, code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run_to_exit_code(config, Topology(), stop) == code
    assert json.loads(file.read_text())["message"]["message"] == reason
