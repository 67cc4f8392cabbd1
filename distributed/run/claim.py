"""The lock and token of a run folder, and all writes to it by a training process. Imports no torch.

A training process writes the shared files of its run folder only through `ClaimedRun`. Every method first checks the token, so
a superseded attempt cannot write.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from loguru import logger

from distributed.config import TrainConfig, as_toml
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import open_regular, replace_json, replace_text, storing, sync_to_disk, write_at_once
from distributed.host.identity import host
from distributed.host.versions import git_state, versions
from distributed.process.exits import SAVE_SECONDS
from distributed.run.folder import RunFolder
from distributed.run.lock_holder import acquire_lock, read_holder, this_process
from distributed.run.records import AttemptRecord, Record, Status, read_attempts, timestamp

LOCK_WAIT_SECONDS = 30.0
UPLOAD_SECONDS = 60.0
"""How long an attempt that stops may upload: half of the time between Slurm's warning and its time limit."""
PROGRESS_SECONDS = 5.0


class ClaimedRun(RunFolder):
    """A run folder that this process may write, until `release` or the end of the process.

    The lock keeps other runs out. The token keeps out a superseded attempt: if the file system lost its locks together with a
    node, such a process may still be alive; its next commit fails because the token has changed.
    """

    def __init__(self, path: Path, *, world_size: int) -> None:
        super().__init__(path)
        self.world_size = world_size
        self.token = uuid.uuid4().hex
        self.identity = self.token
        """The same in every attempt at this run, also on another machine; see `identify`."""
        self._lock = FileLock(path / ".lock")
        self._status_lock, self._ended = threading.Lock(), False
        self._progress: dict[str, int] = {}
        self._next_progress = 0.0
        self._warned: set[str] = set()
        self.save_in_progress: Future[None] | None = None

    @classmethod
    def claim(cls, path: Path, *, world_size: int, uploads: bool = False) -> Self:
        """Acquire the folder's lock, waiting a while for a predecessor that is shutting down, and set a new token.

        Args:
            uploads: the predecessor may have to upload its last checkpoint, so wait longer.

        Raises:
            InputError: the folder cannot be written, or another run holds it.
        """
        run = cls(path, world_size=world_size)
        try:
            run.logs.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            acquire_lock(run._lock, record=run._attempt_file, seconds=LOCK_WAIT_SECONDS + UPLOAD_SECONDS * uploads)
            run._progress["saved_step"] = run.saved_step()
            replace_json(run._attempt_file, this_process(run.token).as_json())
        except OSError as error:
            where = f"{error.filename}: " if error.filename and error.filename != str(path) else ""
            raise InputError(
                f"run_dir = {path}: {where}{error.strerror or error}; give another with --run_dir"
            ) from None
        return run

    def check_token(self) -> None:
        """Raise StorageError if another attempt has claimed the folder, or the folder was removed."""
        holder = read_holder(self._attempt_file)
        if holder.token == self.token:
            return
        if holder.token is not None:
            raise StorageError(f"{self.path} was taken over by {holder}; this attempt ends")
        with storing(self.path):
            is_there = self.path.is_dir()
        if not is_there:
            raise StorageError(
                f"{self.path}: the run folder was removed while the run was writing there; this attempt ends"
            )
        raise StorageError(
            f"{self._attempt_file}: removed or damaged during the run, so the owner of the folder is unknown; this attempt "
            "ends, and the same command resumes from the newest checkpoint"
        )

    def identify(self, saved: str | None, config: TrainConfig) -> str:
        """Set the run's identity and return it. Call this before `begin`.

        Args:
            saved: the identity in the checkpoint that the run resumes from, if any. Otherwise it is that of the last attempt,
                which may have been killed before it saved, or new if the experiment has changed since.
        """
        started = [line for line in read_attempts(self.attempts_file) if line.event == "started" and line.token]
        last = (started[-1].run or started[-1].token) if started and self.has_experiment(config) else None
        self.identity = saved or last or self.token
        return self.identity

    def append(self, file: Path, record: Record) -> None:
        """Append a record as a line of JSON to a file of the run, in a single write.

        Raises:
            StorageError: it could not be written, or another attempt has claimed the folder. Also raised by all methods below.
        """
        self.check_token()
        with storing(file), open(file, "a+b", buffering=0, opener=open_regular) as opened:
            # Check again: an attempt that claims the folder later replaces metrics.jsonl, and this write goes to the old file.
            self.check_token()
            write_at_once(opened, json.dumps(record.as_json()).encode() + b"\n")

    def replace(self, file: Path, text: str) -> None:
        """Replace the content of a file of the run atomically."""
        self.check_token()
        with storing(file):
            replace_text(file, text)

    def commit(self, temporary: Path, path: Path) -> None:
        """Rename a folder to its final name in the run folder, durably, after the metrics up to then."""
        self.check_token()
        with suppress(FileNotFoundError):
            sync_to_disk(self.metrics_file)  # else a power failure could lose them alone
        os.rename(temporary, path)
        sync_to_disk(path.parent)

    def try_cleanup(self, failure: str, work: Callable[[], object]) -> None:
        """Run work in the folder that training does not depend on. Log each error once, as a warning.

        Args:
            failure: description of the failure, for the warning.
        """
        self.check_token()
        try:
            work()
        except OSError as error:
            cause = f"{error.filename2 or error.filename or self.path}: {error.strerror or error}"
            if cause not in self._warned:
                self._warned.add(cause)
                logger.warning("{}: {}; training continues, and the next save tries again", failure, cause)

    def begin(
        self,
        config: TrainConfig,
        *,
        start_step: int,
        bits: dict[str, Any],
        images: dict[str, dict[str, Any]],
        modules: dict[str, dict[str, str]] | None = None,
    ) -> None:
        """Record the config and the start of this attempt.

        Args:
            bits: everything that the results depend on.
            images: identity of each split's images.
            modules: file and digest of each imported module, by setting.
        """
        self.replace(self.config_file, as_toml(config))
        git = git_state()
        with self._status_lock:
            if self._ended:  # by a signal, on another thread
                return
            self._progress = {"step": start_step, "saved_step": start_step}
            self._write_status("running")
            self._append_attempt(
                "started",
                step=start_step,
                run=self.identity,
                world_size=self.world_size,
                versions=versions(),
                git=git,
                bits=bits,
                images=images,
                **({"modules": modules} if modules else {}),
            )

    def progress(self, *, step: int, epoch: int) -> None:
        """Record the current step in status.json, every few seconds.

        Waits for no save, and for the disk only while attempt.json is out of reach.
        """
        if time.monotonic() >= self._next_progress and self._status_lock.acquire(blocking=False):
            try:
                self._next_progress = time.monotonic() + PROGRESS_SECONDS
                if not self._ended:
                    self._progress |= {"step": step, "epoch": epoch}
                    self._write_status("running", synced=False)
            finally:
                self._status_lock.release()

    def saved(self, *, step: int, epoch: int) -> None:
        """Record the step of the newest checkpoint. Called by the thread that wrote it; ignored after `end`."""
        with self._status_lock:
            if not self._ended:
                self._progress["saved_step"] = step
                if step >= self._progress.get("step", 0):
                    self._progress |= {"step": step, "epoch": epoch}
                self._write_status("running")

    def finish_save(self) -> None:
        """Wait a limited time for the save in progress, so that the failure of another rank does not lose it."""
        if self.save_in_progress:
            wait([self.save_in_progress], SAVE_SECONDS)

    def end(
        self, status: str, *, exit_code: ExitCode, reason: str = "", keep_status: bool = False, **progress: int
    ) -> None:
        """Record how this attempt ended: finished, stopped or failed.

        Args:
            keep_status: leave status.json as an earlier attempt has written it.
        """
        with self._status_lock:
            if self._ended:  # by an exit hook, on another thread
                return
            self._ended = True
            self._progress |= progress
            if not keep_status:
                self._write_status(status, reason=reason, exit_code=int(exit_code))
            self._append_attempt(status, reason=reason, exit_code=int(exit_code), **progress)

    def release(self) -> None:
        self._lock.release()

    def _write_status(self, status: str, *, synced: bool = True, **fields: Any) -> None:
        self.check_token()
        common = {
            "status": status,
            "time": timestamp(),
            "pid": os.getpid(),
            "host": host(),
            "world_size": self.world_size,
        }
        record = Status.model_validate(common | fields | self._progress)
        with storing(self.status_file):
            replace_json(self.status_file, record.as_json(), synced=synced)

    def _append_attempt(self, event: str, **fields: Any) -> None:
        record = AttemptRecord(event=event, time=timestamp(), token=self.token, pid=os.getpid(), host=host(), **fields)
        self.append(self.attempts_file, record)
