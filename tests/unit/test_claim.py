"""Only the process that claimed a run folder writes in it; its status and attempts are recorded."""

import ast
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kit.run_folders import config_of
from loguru import logger

from distributed.config import TrainConfig, from_command_line
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import read_json
from distributed.host.versions import versions
from distributed.run import claim, lock_holder
from distributed.run.checkpoint_layout import name_of
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.run.records import SaveRecord


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def run(path) -> Iterator[ClaimedRun]:
    claimed = ClaimedRun.claim(path, world_size=2)
    yield claimed
    claimed.release()


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    messages: list[str] = []
    handle = logger.add(lambda message: messages.append(str(message)), format="{level} {message}")
    yield messages
    logger.remove(handle)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_claim_creates_the_folder(run, path):
    assert (path / "logs").is_dir()
    assert (path / "checkpoints").is_dir()
    assert read_json(path / "attempt.json")["token"] == run.token
    run.check_token()


def test_second_run_is_refused_naming_the_lock_holder(run, path, monkeypatch):
    monkeypatch.setattr(claim, "LOCK_WAIT_SECONDS", 0.05)
    with pytest.raises(InputError, match="another run is writing there") as caught:
        ClaimedRun.claim(path, world_size=1)
    assert f"process {read_json(path / 'attempt.json')['pid']} on" in str(caught.value)
    assert "--run_dir" in str(caught.value)
    run.check_token()


def test_a_successor_waits_for_the_last_upload(run, path, monkeypatch):
    monkeypatch.setattr(claim, "LOCK_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(claim, "UPLOAD_SECONDS", 60.0)
    with ThreadPoolExecutor(1) as thread:
        successor = thread.submit(ClaimedRun.claim, path, world_size=1, uploads=True)
        time.sleep(0.5)
        assert not successor.done()
        run.release()
        thread.submit(successor.result(30).release).result()


def test_released_folder_can_be_claimed_again(path):
    first = ClaimedRun.claim(path, world_size=1)
    first.release()
    second = ClaimedRun.claim(path, world_size=1)
    second.check_token()
    with pytest.raises(StorageError, match="taken over"):
        first.check_token()
    second.release()


def test_superseded_attempt_cannot_write_its_end(run, path):
    run.begin(config_of(path), start_step=0, bits={}, images={})
    (path / "attempt.json").write_text('{"token": "another", "pid": 7, "host": "there"}')
    with pytest.raises(StorageError, match="taken over by process 7 on there"):
        run.end("finished", exit_code=ExitCode.FINISHED)
    assert run.status().status == "running"
    assert [line["event"] for line in lines_of(path / "attempts.jsonl")] == ["started"]


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_folder_that_cannot_be_created_is_bad_input(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run_dir = .*give another with --run_dir"):
        ClaimedRun.claim(tmp_path / below, world_size=1)


def test_status_and_attempts_record_how_an_attempt_ended(run, path):
    config = config_of(path, "--epochs", "3")
    run.begin(config, start_step=5, bits={"threads": 1}, images={})
    assert (run.status().status, run.status().step, run.status().world_size) == ("running", 5, 2)
    run.end("stopped", exit_code=ExitCode.STOPPED, reason="SIGTERM", step=9, epoch=1)
    assert {
        "status": "stopped",
        "reason": "SIGTERM",
        "exit_code": 75,
        "step": 9,
        "epoch": 1,
    }.items() <= run.status().as_json().items()
    started, stopped = lines_of(path / "attempts.jsonl")
    assert started["event"] == "started"
    assert started["bits"] == {"threads": 1}
    assert started["versions"] == versions()
    assert (stopped["event"], stopped["exit_code"], stopped["token"]) == ("stopped", 75, run.token)


def test_saved_config_can_be_passed_back_in(run, path):
    config = config_of(path, "--schedule.name", "plateau", "--early_stopping.patience", "3")
    run.begin(config, start_step=0, bits={}, images={})
    assert from_command_line([str(path / "config.toml")]).config == config


WRITERS: dict[str, Callable[[ClaimedRun], object]] = {
    "a line": lambda run: run.append(run.digests_file, SaveRecord(name=name_of(step=1, epoch=0), tensors={})),
    "a file": lambda run: run.replace(run.config_file, "x"),
    "a checkpoint": lambda run: run.commit(run.logs, run.checkpoints / name_of(step=1, epoch=0)),
    "a cleanup": lambda run: run.try_cleanup("links", lambda: pytest.fail("done")),
    "the start": lambda run: run.begin(config_of(run.path), start_step=0, bits={}, images={}),
    "the progress": lambda run: run.progress(step=1, epoch=0),
    "a save": lambda run: run.saved(step=1, epoch=0),
    "the end": lambda run: run.end("finished", exit_code=ExitCode.FINISHED),
    "an upload": lambda run: run.replace(run.upload_file, "{}"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("by", ["another", "missing file", "garbage"])
def test_only_the_token_holder_writes(run, path, writer, by):
    token = path / "attempt.json"
    if by == "another":
        token.write_text('{"token": "another", "pid": 7, "host": "there"}')
    elif by == "garbage":
        token.write_text("{")
    else:
        token.unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    message = "taken over by process 7 on there" if by == "another" else r"attempt\.json: removed or damaged"
    with pytest.raises(StorageError, match=message):
        WRITERS[writer](run)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("writer", WRITERS)
def test_removed_run_folder_is_reported(run, path, writer):
    shutil.rmtree(path)
    with pytest.raises(StorageError, match="the run folder was removed") as caught:
        WRITERS[writer](run)
    assert "None" not in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_run_folder_out_of_reach_is_reported(run, path, writer, monkeypatch):
    """E.g. a file system that was mounted again: Path.is_dir raises."""

    def stale(self: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    monkeypatch.setattr(lock_holder, "read_object", lambda path, reachable: {})
    monkeypatch.setattr(Path, "is_dir", stale)
    with pytest.raises(StorageError, match="Stale file handle; free disk space or fix permissions"):
        WRITERS[writer](run)


def test_briefly_unreadable_token_is_read_again(run, monkeypatch):
    """E.g. on NFS, where reading a file that was just replaced fails once."""
    answers = iter([{}])
    read = lock_holder.read_object
    monkeypatch.setattr(
        lock_holder, "read_object", lambda path, **options: next(answers, None) or read(path, **options)
    )
    run.check_token()


def test_token_out_of_reach_for_a_while_is_read_again(run, monkeypatch):
    monkeypatch.setattr(lock_holder, "_RETRY_SECONDS", (0.0,) * 5)
    answers = iter([errno.EIO] * 5)
    opens = os.open

    def out_of_reach(path, *arguments, **options):
        if str(path).endswith("attempt.json") and (number := next(answers, None)):
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, *arguments, **options)

    monkeypatch.setattr(os, "open", out_of_reach)
    run.check_token()
    assert next(answers, None) is None
    answers = iter([errno.EIO] * 6)
    with pytest.raises(StorageError, match=r"attempt\.json: Input/output error"):
        run.check_token()


def test_only_the_claimed_run_writes_shared_files():
    """`snapshot` writes checkpoints aside; `commit` brings them in."""
    root = Path(claim.__file__).parents[1]
    modules = [
        *("attempt", "recipe", "metrics/reporter", "metrics/sinks"),
        *(f"checkpoint/{name}" for name in ("checkpointer", "download", "resume_point", "upload")),
    ]
    forbidden = {"append_line", "replace_text", "replace_json", "write_synced", "write_text", "write_bytes", "rename"}
    for module in modules:
        tree = ast.parse((root / f"{module}.py").read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not used & forbidden, module


def test_status_shows_progress_during_training(run, path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(claim.time, "monotonic", lambda: now[0])
    run.begin(config_of(path), start_step=0, bits={}, images={})
    steps = []
    for step in range(1, 31):
        run.progress(step=step, epoch=step // 10)
        now[0] += 1
        steps.append(run.status().step)
    assert steps[0] == 1
    assert all(step - shown < 10 for step, shown in enumerate(steps, start=1))
    assert len(set(steps)) < 10
    assert (run.status().status, run.status().saved_step) == ("running", 0)


def test_earlier_save_does_not_lower_the_progress(run, path):
    run.begin(config_of(path), start_step=0, bits={}, images={})
    run.progress(step=12, epoch=1)
    run.saved(step=10, epoch=1)
    assert (run.status().step, run.status().saved_step) == (12, 10)
    run.saved(step=20, epoch=2)
    assert (run.status().step, run.status().saved_step, run.status().epoch) == (20, 20, 2)


def test_progress_waits_for_neither_disk_nor_save(run, path, monkeypatch):
    run.begin(config_of(path), start_step=0, bits={}, images={})
    monkeypatch.setattr("os.fsync", lambda _: pytest.fail("waited"))
    run.progress(step=1, epoch=0)
    with run._status_lock:
        run._next_progress = 0.0
        run.progress(step=2, epoch=0)
    assert run.status().step == 1


def test_failed_cleanup_warns_once(run, log_lines):
    def fail() -> None:
        raise OSError(39, "Directory not empty", "/there")

    for _ in range(3):
        run.try_cleanup("an old checkpoint was not deleted", fail)
    assert [line.strip() for line in log_lines] == [
        "WARNING an old checkpoint was not deleted: /there: Directory not empty; training continues, and the next save "
        "tries again"
    ]


def test_end_of_attempt_is_not_overwritten(path, tmp_path):
    """On a signal another thread records the end, while the main thread may still begin or log a step."""
    run = ClaimedRun.claim(path, world_size=1)
    run.end("stopped", exit_code=ExitCode.STOPPED, reason="SIGTERM")
    run.begin(TrainConfig(run_dir=path), start_step=0, bits={}, images={})
    run.progress(step=5, epoch=1)
    run.saved(step=5, epoch=1)
    run.release()
    assert run.status().status == "stopped"


def test_failed_start_keeps_the_saved_step(path):
    """An attempt that fails before it starts records its failure, but does not reset saved_step."""
    first = ClaimedRun.claim(path, world_size=1)
    first.begin(config_of(path), start_step=0, bits={}, images={})
    first.saved(step=100, epoch=10)
    first.end("finished", exit_code=ExitCode.FINISHED, step=100, epoch=10)
    first.release()
    second = ClaimedRun.claim(path, world_size=1)
    second.end("failed", exit_code=ExitCode.BAD_INPUT, reason="something")
    second.release()
    assert RunFolder(path).saved_step() == 100


def test_identity_is_kept_until_the_experiment_changes(path):
    """Before its first save a run may change: services that log it must not continue the earlier one's curve."""

    def identity(*settings: str, saved: str | None = None) -> str:
        run, config = ClaimedRun.claim(path, world_size=1), config_of(path, *settings)
        found = run.identify(saved, config)
        run.begin(config, start_step=0, bits={}, images={})
        run.release()
        return found

    first = identity("--optim.lr", "5")
    assert identity("--optim.lr", "5") == identity("--optim.lr", "5", "--logging.every_steps", "7") == first
    changed = identity("--optim.lr", "0.05")
    assert changed != first
    assert identity("--optim.lr", "0.05") == changed
    assert identity("--optim.lr", "0.05", saved=first) == first
