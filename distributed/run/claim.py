"""A run folder held by one process: the lock, the token, and all writing in the folder. Imports no torch.

Nothing else in a training process writes a shared file of the run folder. So a superseded attempt cannot: each method here
asks for the token first.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from loguru import logger

from distributed.config import TrainConfig, as_toml
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import open_regular, read_object, replace_json, replace_text, storing, sync_folder
from distributed.host.versions import git_state, versions
from distributed.run.folder import RunFolder
from distributed.run.lock_holder import holder_record, take_lock
from distributed.topology import host

LOCK_WAIT_SECONDS = 30.0
PROGRESS_SECONDS = 5.0


class ClaimedRun(RunFolder):
    """A run folder held by this process until `release` or its death.

    The lock keeps a second run out. The token keeps out the orphan of an attempt that was given up: on a file system
    whose locks were lost with a node, it may still breathe, and finds at its next commit that another has taken over.
    """

    def __init__(self, path: Path, *, world_size: int) -> None:
        super().__init__(path)
        self.world_size = world_size
        self.token = uuid.uuid4().hex
        self._lock = FileLock(path / ".lock")
        self._status_lock, self._ended = threading.Lock(), False
        self._progress: dict[str, int] = {}
        self._next_progress = 0.0
        self._warned: set[str] = set()

    @classmethod
    def claim(cls, path: Path, *, world_size: int) -> Self:
        """Take the folder, waiting a little for a dying predecessor to let go of it.

        Raises:
            InputError: it cannot be written, or another run holds it.
        """
        run = cls(path, world_size=world_size)
        try:
            run.logs.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            take_lock(run._lock, record=run._attempt_file, seconds=LOCK_WAIT_SECONDS)
            run._progress["saved_step"] = run.saved_step()
            replace_json(run._attempt_file, {"token": run.token} | holder_record())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise InputError(
                f"run_dir = {path}: {where}{error.strerror or error}; give another with --run_dir"
            ) from None
        return run

    def check_ours(self) -> None:
        """Raises StorageError once another attempt has taken the folder, or somebody has removed it."""
        holder = read_object(self._attempt_file)
        if "token" not in holder:  # perhaps only for a moment, on a network file system
            time.sleep(0.1)
            holder = read_object(self._attempt_file)
        if holder.get("token") == self.token:
            return
        if "token" in holder:
            raise StorageError(
                f"{self.path} was taken over by process {holder.get('pid')} on {holder.get('host')}; this attempt ends"
            )
        if not self.path.is_dir():
            raise StorageError(
                f"{self.path}: the run folder was removed while the run was writing there; this attempt ends"
            )
        raise StorageError(
            f"{self._attempt_file}: removed or damaged while the run was writing there, so that nothing shows whose the folder "
            "is; this attempt ends, and the same command resumes from the newest checkpoint"
        )

    def append(self, file: Path, line: dict[str, Any]) -> None:
        """Append a line of JSON to a file of the run, in one write.

        Raises:
            StorageError: it could not be written, or the folder is not ours any more; so for all methods below.
        """
        self.check_ours()
        with storing(file), open(file, "ab", buffering=0, opener=open_regular) as opened:
            # Once more: who takes the folder over from here on replaces metrics.jsonl, and this write goes to the old one.
            self.check_ours()
            opened.write(json.dumps(line).encode() + b"\n")

    def replace(self, file: Path, text: str) -> None:
        """Give a file of the run another content, at once."""
        self.check_ours()
        with storing(file):
            replace_text(file, text)

    def commit(self, aside: Path, path: Path) -> None:
        """Rename a folder into its place in the run folder; on the disk when this returns."""
        self.check_ours()
        os.rename(aside, path)
        sync_folder(path.parent)

    def tidy(self, name: str, work: Callable[[], object]) -> None:
        """Do work in the run folder that the run does not need: a failure is a warning, once each."""
        self.check_ours()
        try:
            work()
        except OSError as error:
            said = f"{error.filename2 or error.filename or self.path}: {error.strerror or error}"
            if said not in self._warned:
                self._warned.add(said)
                logger.warning("{}: {}; training continues, and the next save tries again", name, said)

    def begin(self, config: TrainConfig, *, start_step: int, details: dict[str, Any]) -> None:
        """Write down the config, where this attempt starts and what it runs on.

        Raises:
            StorageError: it could not be written.
        """
        self.replace(self.config_file, as_toml(config))
        git = git_state()
        with self._status_lock:
            if self._ended:  # by a signal, on another thread
                return
            self._progress = {"step": start_step, "saved_step": start_step}
            self._write_status("running")
            self._attempt(
                "started", step=start_step, world_size=self.world_size, versions=versions(), git=git, **details
            )

    def progress(self, *, step: int, epoch: int) -> None:
        """Note where training is; in status.json every few seconds, without a wait for the disk or for a save's thread."""
        if time.monotonic() >= self._next_progress and self._status_lock.acquire(blocking=False):
            try:
                self._next_progress = time.monotonic() + PROGRESS_SECONDS
                if not self._ended:
                    self._progress |= {"step": step, "epoch": epoch}
                    self._write_status("running", synced=False)
            finally:
                self._status_lock.release()

    def saved(self, *, step: int, epoch: int) -> None:
        """Note how far the newest checkpoint goes; called by the thread that wrote it, and ignored after the end."""
        with self._status_lock:
            if not self._ended:
                self._progress["saved_step"] = step
                if step >= self._progress.get("step", 0):
                    self._progress |= {"step": step, "epoch": epoch}
                self._write_status("running")

    def end(self, status: str, *, exit_code: ExitCode, reason: str = "", **progress: int) -> None:
        """Write down how this attempt ended: finished, stopped or failed."""
        with self._status_lock:
            self._ended = True
            self._progress |= progress
            self._write_status(status, reason=reason, exit_code=int(exit_code))
            self._attempt(status, reason=reason, exit_code=int(exit_code), **progress)

    def release(self) -> None:
        self._lock.release()

    def _write_status(self, status: str, *, synced: bool = True, **facts: Any) -> None:
        self.check_ours()
        common = {"status": status, "time": _now(), "pid": os.getpid(), "host": host(), "world_size": self.world_size}
        with storing(self.status_file):
            replace_json(self.status_file, common | facts | self._progress, synced=synced)

    def _attempt(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": _now(), "token": self.token, "pid": os.getpid(), "host": host()} | facts
        self.append(self.attempts_file, line)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
