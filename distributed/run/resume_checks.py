"""Checks that a config fits the run in its folder, before anything starts. Imports no torch."""

import os
import stat
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, changes_experiment, differences
from distributed.config.layers import shown
from distributed.errors import InputError
from distributed.files import read_object
from distributed.run.checkpoint_layout import check_format, checkpoints, newest_whole
from distributed.run.folder import RunFolder, config_in, find_checkpoint
from distributed.run.saved_state import check_state, is_at_end, trained_epochs


def is_finished(config: TrainConfig) -> bool:
    """Check that the config can resume the run in its folder, and return whether that run is finished.

    A run is finished if its status says so and its newest checkpoint is complete and at the end of the run.

    Raises:
        InputError: the folder holds another experiment, a longer run, only damaged checkpoints, or something else.
    """
    run = RunFolder(config.run_dir)
    _check_file_types(run)
    for path in checkpoints(run.checkpoints):
        check_format(path)
    newest = run.newest_saved()
    if newest is None:
        if not config.checkpoint.upload_to:  # otherwise the object store may still have it
            run.check_not_lost()
        return False
    path, content = newest
    check_saved(content, path, config=config)
    if run.status().status != "finished" or not is_at_end(content, config):
        return False
    return newest_whole(run.checkpoints)[0] == path


def _check_file_types(run: RunFolder) -> None:
    """Raise InputError if a path of the run has another file type, e.g. a pipe, on which opening would block."""
    for path in run.logs, run.checkpoints:
        if not (there := next(p for p in (path, *path.parents) if os.path.lexists(p))).is_dir():
            raise InputError(f"run_dir = {run.path}: {there} is not a folder; move it, or give another with --run_dir")
    for path in (*run.shared_files, run.path / ".lock"):
        if os.path.lexists(path) and not _is_file(path):
            raise InputError(
                f"run_dir = {run.path}: {path} is not a regular file; move it, or give another with --run_dir"
            )


def _is_file(path: Path) -> bool:
    """Whether it is a regular file, or a link to one that can be created."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return isinstance(error, FileNotFoundError)


def check_saved(content: dict[str, Any], checkpoint: Path, *, config: TrainConfig, images: int | None = None) -> None:
    """Check a checkpoint's state.json against the config that is to resume from it.

    Args:
        images: number of training images, if known.

    Raises:
        InputError: it belongs to another experiment, its counters are inconsistent, or it is beyond the config's epochs.
    """
    run, remedy = checkpoint.parent.parent, "move it away, or give another --run_dir"
    if missing := [key for key in ("config", "bits") if not isinstance(content.get(key), dict)]:
        raise InputError(
            f"{checkpoint}: {' and '.join(missing)} in state.json: missing or from another version; {remedy}"
        )
    changed_settings(config, content, where=run, option="--run_dir")
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


def changed_settings(config: TrainConfig, state: dict[str, Any], *, where: Path | str, option: str) -> set[str]:
    """Return the settings that differ from a checkpoint's state.json.

    Raises:
        InputError: some of them would make it another experiment.
    """
    saved = config_in(state, where=where, option=option)
    changed = differences(saved, config)
    refused = [change for change in changed if changes_experiment(change[0], config)]
    shards = state["bits"].get("shards", 0)
    if config.exact.shards not in ("auto", shards) and saved.exact.shards == "auto":
        refused.append(("exact.shards", shards, config.exact.shards))
    if refused:
        raise InputError(
            *[f"{where}: {path} = {shown(new)}: this run was begun with {shown(old)}" for path, old, new in refused],
            f"a resumed run keeps its experiment: restore these settings, or give another {option}",
        )
    return {path for path, _, _ in changed}


def check_start(config: TrainConfig) -> None:
    """Raise InputError if `init_from` names no checkpoint, or one of another network. Ignored once the run has saved."""
    if config.init_from is None or RunFolder(config.run_dir).newest_state():
        return
    checkpoint = find_checkpoint(config.init_from)
    check_format(checkpoint)
    model: Any = read_object(checkpoint / "state.json")
    for key in ("config", "model", "name"):
        model = model.get(key) if isinstance(model, dict) else None
    if model != config.model.name:
        raise InputError(
            f"init_from = {config.init_from}: holds weights of {model or 'an unreadable run'}, and model.name = "
            f"{config.model.name}; name another run, or set model.name = {model}"
        )
