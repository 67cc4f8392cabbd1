"""The folder of a run: one writer at a time, where everything lies, and how each attempt ended. Imports no torch.

RUN/config.toml       the resolved config; can be passed back in
RUN/status.json       running | finished | stopped | failed, with the reason, exit code and progress
RUN/attempts.jsonl    a line at the start and at the end of each attempt: when, where, versions, why it ended
RUN/attempt.json      the token of the attempt that may write
RUN/digests.jsonl     a line a save: a digest of every tensor, kept when the checkpoint goes
RUN/upload.json       the newest checkpoint that `checkpoint.upload_to` has, and what went wrong there last
RUN/metrics.jsonl     RUN/tensorboard/   RUN/curves.png   RUN/logs/rank-0000.log   RUN/checkpoints/
RUN/confusion-*.png  RUN/export/  RUN/report.html  made by commands, which do not claim the folder
"""

import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from loguru import logger
from pydantic import ValidationError

from distributed.checkpoint_files import MANIFEST, check_format, checkpoints
from distributed.config import TrainConfig, as_toml, changes_experiment, differences
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import append_line, digest_of, read_object, replace_json, replace_text, storing
from distributed.topology import host
from distributed.versions import git_state, versions

LOCK_WAIT_SECONDS = 30.0


class RunFolder:
    """Paths of a run, for anybody; `claim` makes this process its one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.digests_file = path / "digests.jsonl"
        self.upload_file = path / "upload.json"
        self.curves = path / "curves.png"
        self.logs = path / "logs"
        self.profile = path / "profile"
        self.checkpoints = path / "checkpoints"
        self._status_file = path / "status.json"
        self.attempts_file = path / "attempts.jsonl"
        self._attempt_file = path / "attempt.json"

    def status(self) -> dict[str, Any]:
        """What the last attempt said of itself; empty where there was none."""
        return read_object(self._status_file)

    def newest_state(self) -> dict[str, Any] | None:
        """The state.json of the newest checkpoint whose own is whole."""
        for path in (checkpoint / "state.json" for checkpoint in reversed(checkpoints(self.checkpoints))):
            files, content = read_object(path.with_name(MANIFEST)).get("files"), read_object(path)
            expected = files.get("state.json") if isinstance(files, dict) else None
            if not all(isinstance(content.get(key), dict) for key in ("config", "bits")):
                continue
            if expected is None or expected == list(digest_of(path)):
                return content
        return None

    def saved_config(self) -> TrainConfig | None:
        """The config that the newest checkpoint was made under.

        Raises:
            InputError: this version cannot read it.
        """
        content = self.newest_state()
        return config_in(content, where=self.checkpoints, option="--run_dir") if content else None


def config_in(state: dict[str, Any], *, where: Path | str, option: str) -> TrainConfig:
    """The config in a checkpoint's state.json; an InputError where this version cannot read it."""
    try:
        return TrainConfig.model_validate_json(json.dumps(state["config"]))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{where}: the newest was saved under a config that this version cannot read "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); give another {option}, or use the version it is of"
        ) from None


def check_resume(config: TrainConfig) -> bool:
    """Whether the run in the config's folder is finished already.

    Raises:
        InputError: the run there was begun under settings that make it another experiment.
    """
    run = RunFolder(config.run_dir)
    for path in run.logs, run.checkpoints:
        if not (there := next(p for p in (path, *path.parents) if os.path.lexists(p))).is_dir():
            raise InputError(f"run_dir = {run.path}: {there} is no folder; move it, or give another with --run_dir")
    for path in checkpoints(run.checkpoints):
        check_format(path)
    if (state := run.newest_state()) is None:
        return False
    changed = check_experiment(config, state, where=run.path, option="--run_dir")
    return run.status().get("status") == "finished" and "epochs" not in changed


def check_experiment(config: TrainConfig, state: dict[str, Any], *, where: Path | str, option: str) -> set[str]:
    """The settings that differ from a checkpoint's state.json; an InputError where they make it another experiment."""
    saved = config_in(state, where=where, option=option)
    changed = differences(saved, config)
    refused = [change for change in changed if changes_experiment(change[0], config)]
    shards = state["bits"].get("shards", 0)
    if config.exact.shards not in ("auto", shards) and saved.exact.shards == "auto":
        refused.append(("exact.shards", shards, config.exact.shards))
    if refused:
        raise InputError(
            *[f"{where}: {path} = {new}: this run was begun with {old}" for path, old, new in refused],
            f"a resumed run keeps its experiment: take these settings back, or give another {option}",
        )
    return {path for path, _, _ in changed}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or a run's best, or its latest where none is marked best.

    Raises:
        InputError: there is none.
    """
    for candidate in (path, path / "checkpoints" / "best", path / "checkpoints" / "latest"):
        if (candidate / "manifest.json").is_file():
            return candidate.resolve()
    raise InputError(
        f"init_from = {path}: no checkpoint there; name the folder of a run that has saved, or a checkpoint's"
    )


def check_start(config: TrainConfig) -> None:
    """Raises InputError where `init_from` names no checkpoint, or that of another network. A run that has begun needs it
    no more."""
    if config.init_from is None or RunFolder(config.run_dir).newest_state():
        return
    there: Any = read_object(find_checkpoint(config.init_from) / "state.json")
    for key in ("config", "model", "name"):
        there = there.get(key) if isinstance(there, dict) else None
    if there != config.model.name:
        raise InputError(
            f"init_from = {config.init_from}: holds weights of {there or 'an unreadable run'}, and model.name = "
            f"{config.model.name}; name another run, or set model.name = {there}"
        )


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
            run._take_lock()
            replace_json(run._attempt_file, {"token": run.token, "pid": os.getpid(), "host": host()})
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise InputError(
                f"run_dir = {path}: {where}{error.strerror or error}; give another with --run_dir"
            ) from None
        return run

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
            return
        except Timeout:
            holder = read_object(self._attempt_file)
            who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            logger.warning("{} is held by {}; waiting {:.0f} s for it to end", self.path, who, LOCK_WAIT_SECONDS)
        try:
            self._lock.acquire(timeout=LOCK_WAIT_SECONDS)
        except Timeout:
            raise InputError(
                f"run_dir = {self.path}: another run is writing there ({who}); wait for it, end it, or give another --run_dir"
            ) from None

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
