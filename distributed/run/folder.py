"""The folder of a run: its files, its status and its newest state. Imports no torch.

RUN/config.toml       the resolved config; can be passed back in
RUN/status.json       running | finished | stopped | failed, with the reason, exit code and progress
RUN/attempts.jsonl    a line at the start and at the end of each attempt: when, where, versions, why it ended
RUN/attempt.json      the token of the attempt that may write
RUN/digests.jsonl     a line a save: a digest of every tensor, kept when the checkpoint goes
RUN/upload.json       the newest checkpoint that `checkpoint.upload_to` has, and what went wrong there last
RUN/metrics.jsonl     RUN/tensorboard/   RUN/curves.png   RUN/logs/rank-0000.log   RUN/checkpoints/
RUN/confusion-*.png  RUN/export/  RUN/report.html  made by commands, which do not claim the folder
"""

from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, from_saved
from distributed.errors import InputError
from distributed.files import digest_of, read_object
from distributed.run.checkpoint_layout import MANIFEST, checkpoints, traces
from distributed.run.records import save_lines


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
        self.status_file = path / "status.json"
        self.attempts_file = path / "attempts.jsonl"
        self._attempt_file = path / "attempt.json"
        self.shared_files = (
            self.config_file, self.metrics_file, self.digests_file, self.upload_file, self.status_file, self.attempts_file,
            self._attempt_file,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """What the last attempt said of itself; empty where there was none."""
        return read_object(self.status_file)

    def newest_saved(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose state.json is intact, and the content of that."""
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
        """The state.json of the newest checkpoint whose own is intact."""
        found = self.newest_saved()
        return found and found[1]

    def has_saved(self) -> bool:
        """Whether a checkpoint was ever committed here, although none may be left."""
        return bool(self.saved_step() or traces(self.checkpoints) or save_lines(self.digests_file))

    def saved_step(self) -> int:
        """The step of the newest checkpoint that was ever committed, as far as status.json says."""
        status = self.status()
        # Older versions said no more than where the run was; only one that ended well had saved that.
        step = status.get("saved_step", status.get("step") if status.get("status") in ("finished", "stopped") else 0)
        return step if isinstance(step, int) else 0

    def check_not_lost(self) -> None:
        """Raises InputError if this run has saved and nothing complete is left of that: it never begins again at step 0."""
        if self.has_saved():
            raise InputError(
                f"run_dir = {self.path}: this run has saved checkpoints, and no complete one is left in {self.checkpoints}; "
                "put one back from a copy, or give another --run_dir to begin again"
            )

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
        return from_saved(state["config"])
    except InputError as error:
        raise InputError(
            f"{where}: the newest was saved under a config that this version cannot read ({error.lines[0]}); "
            f"give another {option}, or use the version it is of"
        ) from None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or a run's best, or its newest if no link leads to one.

    Raises:
        InputError: there is none.
    """
    folder = path / "checkpoints"
    for candidate in (path, folder / "best", folder / "latest", *reversed(checkpoints(folder))):
        if (candidate / MANIFEST).is_file():
            return candidate.resolve()
    raise InputError(
        f"init_from = {path}: no checkpoint there; name the folder of a run that has saved, or a checkpoint's"
    )
