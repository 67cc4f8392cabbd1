"""Paths in a run folder, its status and its newest state. Imports no torch.

docs/run-folder.md describes every file. `ClaimedRun` writes them.
"""

import re
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, changes_experiment, differences, from_saved, read_saved
from distributed.errors import InputError
from distributed.run import checkpoint_layout
from distributed.run.records import Status, read_saves


class RunFolder:
    """Paths of a run folder, for reading. `ClaimedRun.claim` makes this process its only writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
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

    @property
    def name(self) -> str:
        """The run's name elsewhere: that of its folder; for a seed of a sweep with the trial's, `optim.lr=0.1/seed-0`."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}" if re.fullmatch(r"seed-\d+", path.name) else path.name

    def status(self) -> Status:
        """Read status.json. All fields are None if there is no such file."""
        return Status.read(self.status_file)

    def newest_saved(self, *, reachable: bool = False) -> checkpoint_layout.SavedState | None:
        """Find the newest checkpoint whose state.json is intact."""
        return checkpoint_layout.newest_saved(self.checkpoints, reachable=reachable)

    def newest_state(self) -> dict[str, Any] | None:
        """Return the content of the newest intact state.json."""
        saved = self.newest_saved()
        return saved and saved.content

    def has_saved(self) -> bool:
        """Whether a checkpoint was ever committed here, even if none is left."""
        damaged_too = checkpoint_layout.saved_or_damaged(self.checkpoints)
        return bool(self.saved_step() or damaged_too or read_saves(self.digests_file))

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint that was ever committed according to status.json."""
        return self.status().saved_step or 0

    def has_experiment(self, config: TrainConfig) -> bool:
        """Whether config.toml, which each attempt replaces, describes the same experiment as `config`."""
        try:
            saved = read_saved(self.config_file)
        except InputError:
            return False
        return not any(changes_experiment(change.path, config) for change in differences(saved, config))

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
        return from_saved(state["config"])
    except InputError as error:
        raise InputError(
            f"{where}: the newest checkpoint has a config that this version cannot read ({error.lines[0]}); "
            f"give another {option}, or use the version that wrote it"
        ) from None
