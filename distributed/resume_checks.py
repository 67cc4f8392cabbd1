"""What must agree between a config and the run in its folder before anything starts. Imports no torch."""

import os
from pathlib import Path
from typing import Any

from distributed.checkpoint_files import check_format, checkpoints
from distributed.config import TrainConfig, changes_experiment, differences
from distributed.config.layers import shown
from distributed.errors import InputError
from distributed.files import read_object
from distributed.run_folder import RunFolder, config_in, find_checkpoint

_FILES = (
    "config.toml", "metrics.jsonl", "digests.jsonl", "status.json", "attempts.jsonl", "attempt.json", "upload.json", ".lock",
)  # fmt: skip


def check_resume(config: TrainConfig) -> bool:
    """Whether the run in the config's folder is finished already.

    Raises:
        InputError: the run there was begun under settings that make it another experiment.
    """
    run = RunFolder(config.run_dir)
    for path in run.logs, run.checkpoints:
        if not (there := next(p for p in (path, *path.parents) if os.path.lexists(p))).is_dir():
            raise InputError(f"run_dir = {run.path}: {there} is no folder; move it, or give another with --run_dir")
    for path in (run.path / name for name in _FILES):
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # a folder fails by itself
            raise InputError(
                f"run_dir = {run.path}: {path} is not a regular file; move it, or give another with --run_dir"
            )
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
            *[f"{where}: {path} = {shown(new)}: this run was begun with {shown(old)}" for path, old, new in refused],
            f"a resumed run keeps its experiment: take these settings back, or give another {option}",
        )
    return {path for path, _, _ in changed}


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
