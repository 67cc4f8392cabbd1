"""Who holds the lock of a run folder, and whether it is known to be gone. Imports no torch.

A lock can outlive its holder: a file server may keep it for a host that is dead, a file system without flock keeps a file, and
a process that was forked off holds it on. It is taken over only if the holder is known to have ended; the token in the folder
keeps out one that has not.
"""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout
from loguru import logger

from distributed.errors import InputError
from distributed.files import read_object
from distributed.topology import boot_id, host, slurm_job

_ASK_SECONDS = 10.0  # a new holder writes down who it is some time after it has the lock
_SCONTROL_SECONDS = 20.0
_AT_WORK = {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}


def holder_record() -> dict[str, Any]:
    """What a later process needs to know of this one to find out whether it lives."""
    pid, (name, system, namespace) = os.getpid(), _here()
    process = {"pid": pid, "host": name, "machine": system, "pid_namespace": namespace, "began": _began(pid)}
    return process | {"slurm": job._asdict() if (job := slurm_job()) else {}}


def take_lock(lock: BaseFileLock, *, record: Path, seconds: float) -> None:
    """Take the lock of the record's folder, waiting a while for a dying predecessor to let go of it.

    Raises:
        InputError: another process holds it, and is not known to be gone.
    """
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        holder = read_object(record)
    logger.warning("{} is held by {}; waiting {:.0f} s for it to end", record.parent, _name(holder), seconds)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        inode = _inode(lock.lock_file)
        if _acquired(lock, min(left, _ASK_SECONDS, seconds / 3)):
            return
        before, holder = holder, read_object(record)
        if holder == before and (why := gone(holder)):
            logger.warning("{}: taken over from {}: {}", lock.lock_file, _name(holder), why)
            _remove(Path(lock.lock_file), inode)
            if _acquired(lock, 0):
                return
    raise InputError(
        f"run_dir = {record.parent}: another run is writing there ({_name(holder)}); wait for it, end it, or give another "
        f"--run_dir; if that process is gone for certain, remove {lock.lock_file}"
    )


def gone(holder: dict[str, Any]) -> str:
    """Why the process of this record cannot be alive any more; empty if it may be."""
    pid, slurm, here = holder.get("pid"), holder.get("slurm"), ("host", "machine", "pid_namespace")
    if (
        isinstance(pid, int)
        and 0 < pid < 2**31
        and all(holder.get(key) == own for key, own in zip(here, _here(), strict=True))
    ):
        return f"process {pid} has ended" if _has_ended(pid, holder.get("began")) else ""
    return _gone_from_slurm(slurm) if isinstance(slurm, dict) else ""


def _gone_from_slurm(job: dict[str, Any]) -> str:
    number, restarts, ours = str(job.get("job", "")), job.get("restarts"), slurm_job()
    if not number.isdecimal() or not isinstance(restarts, int):
        return ""
    if (ours.cluster if ours else "") != job.get("cluster", ""):
        return ""  # another cluster counts its jobs anew
    if ours and ours.job == number:
        return f"Slurm has begun job {number} anew" if restarts < ours.restarts else ""
    state, restarts_now = _ask_slurm(number)
    if state == "NONE":
        return f"Slurm does not know job {number} any more"
    if state and state not in _AT_WORK:
        return f"Slurm says that job {number} is {state}"
    return f"Slurm has begun job {number} anew" if state and restarts_now > restarts else ""


def _ask_slurm(number: str) -> tuple[str, int]:
    """State and number of restarts of a job; the state is NONE for an unknown job, empty if Slurm does not say."""
    try:
        asked = subprocess.run(
            ["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=False, timeout=_SCONTROL_SECONDS
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "", 0
    return read_answer(asked.stdout, asked.stderr)


def read_answer(out: str, error: str) -> tuple[str, int]:
    """`_ask_slurm` of what scontrol printed."""
    if "Invalid job id specified" in error:
        return "NONE", 0
    states = re.findall(r"\bJobState=(\w+)", out)  # several of an array or of a job of several components
    restarts = [int(number) for number in re.findall(r"\bRestarts=([0-9]+)", out)]
    at_work = next((state for state in states if state in _AT_WORK), None)
    return at_work or (states or [""])[0], min(restarts, default=0)


def _acquired(lock: BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _remove(file: Path, inode: int) -> None:
    """Remove the lock file if it is that one still: another process may have taken it over meanwhile."""
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


def _name(holder: dict[str, Any]) -> str:
    slurm = holder.get("slurm")
    job = f" in Slurm job {slurm['job']}" if isinstance(slurm, dict) and slurm.get("job") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}"


def _here() -> tuple[str, str, int]:
    """Where process ids mean what they mean here: one host, since a copy of a virtual machine has all else alike."""
    return host(), boot_id(), _inode("/proc/self/ns/pid")


def _has_ended(pid: int, began: object) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return _began(pid) not in (None, began)


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, which tells it from a later one with its id; empty for a dead one that was
    not waited for, None if this is not to be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
