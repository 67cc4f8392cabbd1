"""What must agree between a config and the run in its folder before anything starts. Imports no torch."""

import os
import stat
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, changes_experiment, differences
from distributed.config.differences import Difference
from distributed.config.layers import shown
from distributed.errors import InputError
from distributed.files import read_object
from distributed.run.checkpoint_layout import check_format, checkpoints, newest_whole
from distributed.run.folder import RunFolder, config_in, find_checkpoint
from distributed.run.saved_state import check_state, is_at_end, trained_epochs


def check_resume(config: TrainConfig) -> bool:
    """Whether the run in the config's folder is finished already: its newest complete checkpoint is that of its end.

    Raises:
        InputError: the run there is another experiment, longer than asked for, damaged beyond use, or no run.
    """
    run = RunFolder(config.run_dir)
    _check_kinds(run)
    for path in checkpoints(run.checkpoints):
        check_format(path)
    newest = run.newest_saved()
    if newest is None:
        if not config.checkpoint.upload_to:  # a store may have what is lost here
            run.check_not_lost()
        return False
    path, content = newest
    check_saved(content, path, config=config)
    if run.status().get("status") != "finished" or not is_at_end(content, config):
        return False
    return newest_whole(run.checkpoints)[0] == path


def _check_kinds(run: RunFolder) -> None:
    """Raises InputError if something else stands in place of a folder or file of the run: a pipe would be waited for."""
    for path in run.logs, run.checkpoints:
        if not (there := next(p for p in (path, *path.parents) if os.path.lexists(p))).is_dir():
            raise InputError(f"run_dir = {run.path}: {there} is no folder; move it, or give another with --run_dir")
    for path in (*run.shared_files, run.path / ".lock"):
        if os.path.lexists(path) and not _is_file(path):
            raise InputError(
                f"run_dir = {run.path}: {path} is not a regular file; move it, or give another with --run_dir"
            )


def _is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one that can be made."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return isinstance(error, FileNotFoundError)


def check_saved(content: dict[str, Any], checkpoint: Path, *, config: TrainConfig, images: int | None = None) -> None:
    """Check what a checkpoint's state.json says against the config that is to resume from it.

    Args:
        images: number of training images if it is known already.

    Raises:
        InputError: it is another experiment's, its counters are none of this run, or it is past the config's end.
    """
    run, remedy = checkpoint.parent.parent, "move it away, or give another --run_dir"
    if missing := [key for key in ("config", "bits") if not isinstance(content.get(key), dict)]:
        raise InputError(f"{checkpoint}: {' and '.join(missing)} in state.json: of another version; {remedy}")
    check_experiment(config, content, where=run, option="--run_dir")
    saved = config_in(content, where=run, option="--run_dir")
    try:
        check_state(content, saved, images=images)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}; {remedy}") from None
    epochs, steps = trained_epochs(content)
    if (epochs, steps) > (config.epochs, 0):
        trained = f"{epochs} epoch{'s' if epochs != 1 else ''}" + (f" and {steps} steps" if steps else "")
        raise InputError(
            f"epochs = {config.epochs}: the run in {run} has trained {trained} already; give --epochs "
            f"{epochs + bool(steps)} or more, or another --run_dir"
        )


def check_experiment(config: TrainConfig, state: dict[str, Any], *, where: Path | str, option: str) -> set[str]:
    """The settings that differ from a checkpoint's state.json; an InputError where they make it another experiment."""
    saved = config_in(state, where=where, option=option)
    changed = differences(saved, config)
    refused = [change for change in changed if changes_experiment(change[0], config)]
    shards = state["bits"].get("shards", 0)
    if config.exact.shards not in ("auto", shards) and saved.exact.shards == "auto":
        refused.append(Difference("exact.shards", shards, config.exact.shards))
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
    checkpoint = find_checkpoint(config.init_from)
    check_format(checkpoint)
    there: Any = read_object(checkpoint / "state.json")
    for key in ("config", "model", "name"):
        there = there.get(key) if isinstance(there, dict) else None
    if there != config.model.name:
        raise InputError(
            f"init_from = {config.init_from}: holds weights of {there or 'an unreadable run'}, and model.name = "
            f"{config.model.name}; name another run, or set model.name = {there}"
        )
