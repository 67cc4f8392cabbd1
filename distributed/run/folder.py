"""Paths in a run folder, its status and its newest state. Imports no torch.

docs/run-folder.md describes every file. `ClaimedRun` writes them.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distributed.config import TrainConfig
from distributed.errors import InputError
from distributed.files import digest_of, read_object
from distributed.run.checkpoint_layout import MANIFEST, checkpoints, traces
from distributed.run.records import Status, read_saves


class RunFolder:
    """Paths of a run folder, for reading. `ClaimedRun.claim` makes this process its only writer."""

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
        self.status_file = path / "status.json"
        self.attempts_file = path / "attempts.jsonl"
        self._attempt_file = path / "attempt.json"
        self.shared_files = (
            self.config_file, self.metrics_file, self.digests_file, self.upload_file, self.status_file, self.attempts_file,
            self._attempt_file,
        )  # fmt: skip

    def status(self) -> Status:
        """Read status.json. All fields are None if there is no such file."""
        return Status.read(self.status_file)

    def newest_saved(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint with an intact state.json, and the content of that file."""
        for checkpoint in reversed(checkpoints(self.checkpoints)):
            path = checkpoint / "state.json"
            files, content = read_object(checkpoint / MANIFEST).get("files"), read_object(path)
            expected = files.get("state.json") if isinstance(files, dict) else None
            if not all(isinstance(content.get(key), dict) for key in ("config", "bits")):
                continue
            if expected == list(digest_of(path)):
                return checkpoint, content
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """Return the content of the newest intact state.json."""
        found = self.newest_saved()
        return found and found[1]

    def has_saved(self) -> bool:
        """Whether a checkpoint was ever committed here, even if none is left."""
        return bool(self.saved_step() or traces(self.checkpoints) or read_saves(self.digests_file))

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint that was ever committed according to status.json."""
        status = self.status()
        if status.saved_step is not None:
            return status.saved_step
        # Older versions recorded only the current step, which is saved if the run ended well.
        return status.step or 0 if status.status in ("finished", "stopped") else 0

    def check_not_lost(self) -> None:
        """Raise InputError if this run has saved checkpoints and no complete one is left: it must not restart at step 0."""
        if self.has_saved():
            raise InputError(
                f"run_dir = {self.path}: this run has saved checkpoints, and no complete one is left in {self.checkpoints}; "
                "restore one from a copy, or give another --run_dir to start over"
            )

    def saved_config(self) -> TrainConfig | None:
        """Return the config that the newest checkpoint was saved under.

        Raises:
            InputError: this version cannot read it.
        """
        content = self.newest_state()
        return config_in(content, where=self.checkpoints, option="--run_dir") if content else None


def config_in(state: dict[str, Any], *, where: Path | str, option: str) -> TrainConfig:
    """Return the config in a checkpoint's state.json. Raises InputError if this version cannot read it."""
    try:
        return TrainConfig.model_validate_json(json.dumps(state["config"]))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{where}: the newest checkpoint has a config that this version cannot read "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); give another {option}, or the version that wrote it"
        ) from None


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path names: itself, or for a run folder the best one, or else the newest.

    Raises:
        InputError: no checkpoint was found.
    """
    folder = path / "checkpoints"
    for candidate in (path, folder / "best", folder / "latest", *reversed(checkpoints(folder))):
        if (candidate / MANIFEST).is_file():
            return candidate.resolve()
    raise InputError(f"init_from = {path}: no checkpoint there; name a run folder with checkpoints, or a checkpoint")
