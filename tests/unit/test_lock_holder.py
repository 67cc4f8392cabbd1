"""A lock is taken over from a holder that has ended, and not from one that may be running."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, SoftFileLock
from loguru import logger

from distributed.data.sources import once_per_node
from distributed.errors import InputError
from distributed.files import read_object, replace_json
from distributed.run import lock_holder
from distributed.run.claim import ClaimedRun
from distributed.run.lock_holder import acquire_lock, parse_scontrol, this_process, why_ended
from distributed.run.records import Holder

OURS = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "one"}
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ended() -> dict[str, Any]:
    """The record of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return this_process().as_json() | {"pid": process.pid}


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose lock another process holds, e.g. a child of the recorded holder."""
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield tmp_path
        process.kill()


def acquire(folder: Path, lock: Any = FileLock, *, seconds: float = 0.6) -> None:
    lock = lock(folder / ".lock")
    acquire_lock(lock, record=folder / "attempt.json", seconds=seconds)
    lock.release()


def test_lock_of_an_ended_process_is_taken_over(locked: Path, ended: dict[str, Any]) -> None:
    replace_json(locked / "attempt.json", ended)
    acquire(locked)
    assert {path.name for path in locked.iterdir()} <= {".lock", "attempt.json"}


def test_soft_lock_of_an_ended_process_is_taken_over(tmp_path: Path, ended: dict[str, Any]) -> None:
    """On a file system without flock, the existence of the file is the lock."""
    (tmp_path / ".lock").write_text("1\nelsewhere\n")
    replace_json(tmp_path / "attempt.json", ended)
    acquire(tmp_path, SoftFileLock)


@pytest.mark.parametrize(
    "changed",
    [
        {"pid": os.getppid()},
        {"host": "elsewhere"},
        {"machine": "another"},
        {"pid_namespace": 1},
        {"pid": "12"},
        {"pid": 0},
        {"pid": -1},
        {"pid": None},
        {"pid": 2**40},
        {"slurm": "7", "host": "elsewhere"},
        {"slurm": {"job": "x"}, "host": "elsewhere"},
        {"slurm": {"job": "7; true", "restarts": 0, "cluster": ""}, "host": "elsewhere"},
        {"slurm": {"job": "7", "restarts": "0", "cluster": ""}, "host": "elsewhere"},
    ],
    ids=str,
)
def test_holder_that_may_be_alive_keeps_the_lock(locked: Path, ended: dict[str, Any], changed: dict[str, Any]) -> None:
    if changed == {"pid": os.getppid()}:
        changed = changed | {"began": lock_holder._start_time(os.getppid())}
    replace_json(locked / "attempt.json", ended | changed)
    with pytest.raises(InputError) as caught:
        acquire(locked, seconds=0.2)
    (line,) = caught.value.lines
    assert f"if that process has certainly ended, remove {locked / '.lock'}" in line
    pid = changed.get("pid", ended["pid"])
    assert f"process {pid if isinstance(pid, int) else '?'} on {changed.get('host', ended['host'])}" in line


@pytest.mark.parametrize("content", ["", "{}", "[1]", "null", '{"pid": 1', '{"pid": 1, "host": "other", "token": "x"}'])
def test_invalid_record_keeps_the_lock(locked: Path, content: str) -> None:
    (locked / "attempt.json").write_text(content)
    with pytest.raises(InputError, match="another run is writing there"):
        acquire(locked, seconds=0.2)


def test_new_holder_has_time_to_write_its_record(locked: Path, ended: dict[str, Any]) -> None:
    """The record changes while we wait, so the new holder is alive."""
    replace_json(locked / "attempt.json", ended)
    before = Holder.read
    reads = iter(
        [ended, *[this_process().as_json() | {"pid": os.getppid(), "began": lock_holder._start_time(os.getppid())}] * 9]
    )
    Holder.read = lambda _: Holder.model_validate(next(reads))
    try:
        with pytest.raises(InputError, match=f"process {os.getppid()} on"):
            acquire(locked, seconds=0.3)
    finally:
        Holder.read = before


def test_lock_file_of_a_new_holder_is_not_removed(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    file.write_text("theirs")
    lock_holder._remove(file, inode=1)
    assert file.read_text() == "theirs"
    lock_holder._remove(file, inode=file.stat().st_ino)
    assert list(tmp_path.iterdir()) == []
    lock_holder._remove(file, inode=1)


def test_lock_is_acquired_when_the_predecessor_ends(locked: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, locked / "other"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ):
        lock = FileLock(locked / "other")
        start = time.monotonic()
        acquire_lock(lock, record=locked / "attempt.json", seconds=30)
        assert time.monotonic() - start < 25
        lock.release()


def test_attempt_file_includes_the_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    ClaimedRun.claim(tmp_path, world_size=1).release()
    record = read_object(tmp_path / "attempt.json")
    assert record["slurm"] == {"job": "7", "restarts": 2, "cluster": "one"}
    assert record.items() >= this_process().as_json().items()
    assert not why_ended(Holder.model_validate(record))


@pytest.mark.parametrize(
    ("job", "restarts", "cluster", "why"),
    [
        ("7", 1, "one", "Slurm has restarted job 7"),
        ("7", 0, "one", "Slurm has restarted job 7"),
        ("7", 2, "one", ""),
        ("7", 3, "one", ""),
        ("7", 1, "two", ""),
        ("7", None, "one", ""),
    ],
)
def test_earlier_start_of_the_same_slurm_job_has_ended(
    monkeypatch: pytest.MonkeyPatch, job: str, restarts: int | None, cluster: str, why: str
) -> None:
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    holder = this_process().as_json() | {
        "host": "lost",
        "slurm": {"job": job, "restarts": restarts, "cluster": cluster},
    }
    assert why_ended(Holder.model_validate(holder)) == why


@pytest.mark.parametrize(
    ("out", "error", "answer"),
    [
        ("JobId=9 UserId=root(0) JobState=RUNNING Reason=None Requeue=1 Restarts=1 BatchFlag=1", "", ("RUNNING", 1)),
        ("JobId=9 JobName=x JobState=PENDING Reason=BeginTime Restarts=3", "", ("PENDING", 3)),
        ("JobId=9 JobState=NODE_FAIL Reason=NodeDown Restarts=0", "", ("NODE_FAIL", 0)),
        ("", "slurm_load_jobs error: Invalid job id specified", ("NONE", 0)),
        ("", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", ("", 0)),
        ("", "", ("", 0)),
    ],
)  # fmt: skip
def test_scontrol_output_is_parsed(out: str, error: str, answer: tuple[str, int]) -> None:
    assert parse_scontrol(out, error) == answer


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (("RUNNING", 0), ""),
        (("COMPLETING", 0), ""),
        (("SUSPENDED", 0), ""),
        (("", 0), ""),
        (("RUNNING", 1), "Slurm has restarted job 9"),
        (("PENDING", 1), "Slurm says that job 9 is PENDING"),
        (("NODE_FAIL", 0), "Slurm says that job 9 is NODE_FAIL"),
        (("CANCELLED", 0), "Slurm says that job 9 is CANCELLED"),
        (("NONE", 0), "Slurm no longer knows job 9"),
    ],
)
def test_slurm_decides_whether_another_job_has_ended(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[str, int], why: str
) -> None:
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lock_holder, "_query_slurm", lambda number: answer if number == "9" else None)
    holder = this_process().as_json() | {"host": "lost", "slurm": {"job": "9", "restarts": 0, "cluster": "one"}}
    assert why_ended(Holder.model_validate(holder)) == why


@pytest.mark.parametrize(("cluster", "why"), [("one", "Slurm says that job 9 is NODE_FAIL"), ("two", "")])
def test_slurm_is_asked_outside_a_job_too(monkeypatch: pytest.MonkeyPatch, cluster: str, why: str) -> None:
    """On a login node no variable names the cluster."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock_holder, "_default_cluster", lambda: "one")
    monkeypatch.setattr(lock_holder, "_query_slurm", lambda number: ("NODE_FAIL", 0))
    holder = this_process().as_json() | {"host": "lost", "slurm": {"job": "9", "restarts": 0, "cluster": cluster}}
    assert why_ended(Holder.model_validate(holder)) == why


def test_listing_runs_asks_an_absent_slurm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query without an answer takes 20 seconds."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    queries = lock_holder.SlurmQueries()
    for number in "123":
        assert queries(number) == ("", 0)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_blocked_work_names_its_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once_per_node, "_QUIET_SECONDS", 0.1)
    done: list[int] = []
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / ".data.lock"], stdin=subprocess.PIPE) as process:
        while not (tmp_path / ".data.lock").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        threading.Timer(0.6, process.kill).start()
        once_per_node.once_per_node(tmp_path / "data", lambda: done.append(1), done=lambda: bool(done))
    assert done == [1]
    logger.remove(sink)
    assert f"({tmp_path / '.data.lock'}); remove that file only if no such process is left" in messages[0]
