"""A run folder held by one process: the lock, the token, and the lines that only its holder writes. Imports no torch."""

import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from distributed.config import TrainConfig, as_toml
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import append_line, read_object, replace_json, replace_text, storing
from distributed.lock_holder import holder_record, take_lock
from distributed.run_folder import RunFolder
from distributed.topology import host
from distributed.versions import git_state, versions

LOCK_WAIT_SECONDS = 30.0


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
        self._telling, self._ended = threading.Lock(), False

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
            replace_json(run._attempt_file, {"token": run.token} | holder_record())
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise InputError(
                f"run_dir = {path}: {where}{error.strerror or error}; give another with --run_dir"
            ) from None
        return run

    def check_ours(self) -> None:
        """Raises StorageError once another attempt has taken the folder; asked before each commit."""
        holder = read_object(self._attempt_file)
        if holder.get("token") != self.token:
            raise StorageError(
                f"{self.path} was taken over by process {holder.get('pid')} on {holder.get('host')}; this attempt ends"
            )

    def begin(self, config: TrainConfig, *, start_step: int, details: dict[str, Any]) -> None:
        """Write down the config, where this attempt starts and what it runs on.

        Raises:
            StorageError: it could not be written.
        """
        with storing(self.path):
            replace_text(self.config_file, as_toml(config))
            self._say("running", step=start_step)
            self._attempt(
                "started", step=start_step, world_size=self.world_size, versions=versions(), git=git_state(), **details
            )

    def progress(self, *, step: int, epoch: int) -> None:
        """Say how far the newest checkpoint goes; called by the thread that wrote it, and nothing once the end is told."""
        with self._telling:
            if not self._ended:
                self._say("running", step=step, epoch=epoch)

    def end(self, status: str, *, exit_code: ExitCode, reason: str = "", **progress: int) -> None:
        """Say how this attempt ended: finished, stopped or failed."""
        with self._telling:
            self._ended = True
            self._say(status, reason=reason, exit_code=int(exit_code), **progress)
            self._attempt(status, reason=reason, exit_code=int(exit_code), **progress)

    def release(self) -> None:
        self._lock.release()

    def _say(self, status: str, **facts: Any) -> None:
        self.check_ours()
        common = {"status": status, "time": _now(), "pid": os.getpid(), "host": host(), "world_size": self.world_size}
        replace_json(self._status_file, common | facts)

    def _attempt(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": _now(), "token": self.token, "pid": os.getpid(), "host": host()} | facts
        append_line(self.attempts_file, json.dumps(line))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
