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

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distributed.checkpoint_files import MANIFEST, checkpoints
from distributed.config import TrainConfig
from distributed.errors import InputError
from distributed.files import digest_of, read_object


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
