"""The process that holds the lock of a run folder, and whether it has ended. Imports no torch.

A lock can outlive its holder: a file server may keep the lock of a dead host, a file system without flock keeps a lock file,
and a forked child inherits the lock. The lock is taken over only if its holder is known to have ended; the token in the
folder keeps out a holder that has not.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from filelock import BaseFileLock, Timeout
from loguru import logger

from distributed.errors import InputError
from distributed.files import read_object, storing
from distributed.host.identity import boot_id, host
from distributed.run.records import Holder, SlurmRecord
from distributed.topology import slurm_job

_RECORD_SECONDS = 10.0  # a new holder writes its record some time after it has acquired the lock
_SCONTROL_SECONDS = 20.0
_ACTIVE_STATES = {
    "RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED",
}  # fmt: skip


_RETRY_SECONDS = (0.1, 1.0, 4.0, 10.0, 15.0)
"""Pauses between attempts to read a record that is out of reach; a missing one is read again once."""


def read_holder(file: Path) -> Holder:
    """Read attempt.json. On a network file system it may be missing for a moment, and out of reach for some time.

    Raises:
        StorageError: it is out of reach for good.
    """
    for seconds in _RETRY_SECONDS:
        with suppress(OSError):
            content = read_object(file, reachable=True)
            if content or seconds > _RETRY_SECONDS[0]:
                return Holder.model_validate(content)
        time.sleep(seconds)
    with storing(file):
        return Holder.model_validate(read_object(file, reachable=True))


def this_process(token: str | None = None) -> Holder:
    """Describe this process, so that a later process can find out whether it has ended."""
    pid, (name, machine, namespace), job = os.getpid(), _location(), slurm_job()
    return Holder(
        **({"token": token} if token else {}),
        pid=pid,
        host=name,
        machine=machine,
        pid_namespace=namespace,
        began=_start_time(pid),
        slurm=SlurmRecord(**job._asdict()) if job else SlurmRecord(),
    )


def acquire_lock(lock: BaseFileLock, *, record: Path, seconds: float) -> None:
    """Acquire the lock, waiting a while for a holder that is shutting down.

    Args:
        record: attempt.json, in the folder of the lock.

    Raises:
        InputError: another process holds the lock, and is not known to have ended.
    """
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        holder = Holder.read(record)
    logger.warning("{} is held by {}; waiting {:.0f} s for it to end", record.parent, holder, seconds)
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        inode = _inode(lock.lock_file)
        if _try_acquire(lock, min(remaining, _RECORD_SECONDS, seconds / 3)):
            return
        previous, holder = holder, Holder.read(record)
        if holder == previous and (why := why_ended(holder)):
            logger.warning("{}: taken over from {}: {}", lock.lock_file, holder, why)
            _remove(Path(lock.lock_file), inode)
            if _try_acquire(lock, 0):
                return
    raise InputError(
        f"run_dir = {record.parent}: another run is writing there ({holder}); wait for it, end it, or give "
        f"another --run_dir; if that process has certainly ended, remove {lock.lock_file}"
    )


def why_ended(holder: Holder, query_slurm: "SlurmQuery | None" = None) -> str:
    """Return how it is known that this process has ended; empty if it may be running.

    Args:
        query_slurm: default: asks scontrol.
    """
    pid = holder.pid
    if pid is not None and 0 < pid < 2**31 and (holder.host, holder.machine, holder.pid_namespace) == _location():
        return f"process {pid} has ended" if _has_ended(pid, holder.began) else ""
    return _why_slurm_job_ended(holder.slurm, query_slurm or _query_slurm) if holder.slurm else ""


def _why_slurm_job_ended(job: SlurmRecord, query_slurm: "SlurmQuery") -> str:
    ours = slurm_job()
    if job.job is None or not job.job.isdecimal() or job.restarts is None:
        return ""
    cluster = ours.cluster if ours else _default_cluster() if job.cluster else ""
    if cluster != (job.cluster or ""):
        return ""  # job ids of another cluster mean other jobs
    if ours and ours.job == job.job:
        return f"Slurm has restarted job {job.job}" if job.restarts < ours.restarts else ""
    state, restarts = query_slurm(job.job)
    if state == "NONE":
        return f"Slurm no longer knows job {job.job}"
    if state and state not in _ACTIVE_STATES:
        return f"Slurm says that job {job.job} is {state}"
    return f"Slurm has restarted job {job.job}" if state and restarts > job.restarts else ""


@cache
def _default_cluster() -> str:
    """Return the cluster that scontrol asks outside a job; empty if it does not answer."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, check=False, timeout=_SCONTROL_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


class JobState(NamedTuple):
    """State and number of restarts of a Slurm job. The state is NONE for an unknown job, empty without an answer."""

    state: str
    restarts: int


SlurmQuery = Callable[[str], JobState]
"""Returns the state of the job with a number."""


def _query_slurm(number: str) -> JobState:
    try:
        done = subprocess.run(
            ["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=False, timeout=_SCONTROL_SECONDS
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return JobState("", 0)
    return parse_scontrol(done.stdout, done.stderr)


class SlurmQueries:
    """Asks Slurm about each job once, and no more once it has not answered, for which it takes up to 20 seconds."""

    def __init__(self) -> None:
        self._states: dict[str, JobState] = {}
        self._answers = True

    def __call__(self, number: str) -> JobState:
        if self._answers and number not in self._states:
            self._states[number] = _query_slurm(number)
            self._answers = bool(self._states[number].state)
        return self._states.get(number, JobState("", 0))


def parse_scontrol(out: str, error: str) -> JobState:
    """Parse the output of `scontrol -o show job NUMBER`."""
    if "Invalid job id specified" in error:
        return JobState("NONE", 0)
    states = re.findall(r"\bJobState=(\w+)", out)  # several for a job array or a heterogeneous job
    restarts = [int(number) for number in re.findall(r"\bRestarts=([0-9]+)", out)]
    active = next((state for state in states if state in _ACTIVE_STATES), None)
    return JobState(active or (states or [""])[0], min(restarts, default=0))


def _try_acquire(lock: BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _remove(file: Path, inode: int) -> None:
    """Remove the lock file, but only the one with this inode: another process may have replaced it meanwhile."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        os.rename(file, aside)
        if _inode(aside) == inode:
            aside.unlink()
        else:
            os.rename(aside, file)
    except FileNotFoundError:
        return


def _inode(file: str | Path) -> int:
    try:
        return os.stat(file).st_ino
    except OSError:
        return 0


def _location() -> tuple[str, str, int]:
    """Return host name, boot id and pid namespace: a pid's scope. Cloned machines may differ in name only."""
    return host(), boot_id(), _inode("/proc/self/ns/pid")


def _has_ended(pid: int, began: object) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process
    return _start_time(pid) not in (None, began)


def _start_time(pid: int) -> str | None:
    """Return when a process started, in kernel ticks, which distinguishes it from a later process with the same id.

    Empty for a zombie; None if it cannot be determined.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
