"""Checks that a config fits the run in its folder, before anything starts. Imports no torch."""

import os
import stat
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, changes_experiment, differences
from distributed.config.differences import Difference
from distributed.config.layers import shown
from distributed.config.networks import BUILT_IN
from distributed.errors import InputError, counted
from distributed.files import read_object
from distributed.run.checkpoint_layout import (
    STATE,
    SavedState,
    check_format,
    check_formats,
    newest_complete,
)
from distributed.run.folder import RunFolder, config_in
from distributed.run.saved_state import check_state, is_at_end, trained_so_far
from distributed.run.weights_file import check_weights_file, check_weights_folder, is_weights_file


def check_run_folder(config: TrainConfig) -> SavedState | None:
    """Check that the config may start or resume the run in its folder.

    Returns:
        The newest saved state, or None if the run has not saved yet.

    Raises:
        InputError: the run there is a different experiment, has trained for more epochs than configured or is damaged
            beyond use, or the folder is not a run folder.
    """
    run = RunFolder(config.run_dir)
    _check_file_types(run)
    check_formats(run.checkpoints)
    saved = run.newest_saved(reachable=True)
    if saved:
        check_saved(saved.content, saved.checkpoint, config=config)
    elif not config.checkpoint.upload_to:  # otherwise the object store may still have one
        run.check_not_lost()
    return saved


def is_finished(config: TrainConfig, saved: SavedState | None) -> bool:
    """Whether the run in the config's folder has finished: its newest checkpoint is complete and at the end of the run."""
    run = RunFolder(config.run_dir)
    if saved is None or run.status().status != "finished" or not is_at_end(saved.content, config):
        return False
    return newest_complete(run.checkpoints).checkpoint == saved.checkpoint


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
    """Whether it is a regular file, or a link whose target does not exist yet."""
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
            f"{checkpoint}: state.json lacks {' and '.join(missing)}: written by another version; {remedy}"
        )
    changed_settings(config, content, where=run, option="--run_dir")
    saved = config_in(content, where=run, option="--run_dir")
    try:
        check_state(content, saved, images=images)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}; {remedy}") from None
    epochs, steps = trained_so_far(content)
    if (epochs, steps) > (config.epochs, 0):
        trained = counted(epochs, "epoch") + (f" and {counted(steps, 'step')}" if steps else "")
        raise InputError(
            f"epochs = {config.epochs}: the run in {run} has already trained {trained}; give --epochs "
            f"{epochs + bool(steps)} or more, or another --run_dir"
        )


def changed_settings(config: TrainConfig, state: dict[str, Any], *, where: Path | str, option: str) -> set[str]:
    """Return the settings that differ from those in a checkpoint's state.json.

    Raises:
        InputError: a changed setting makes it a different experiment.
    """
    saved = config_in(state, where=where, option=option)
    changed = differences(saved, config)
    refused = [change for change in changed if changes_experiment(change[0], config) and not _is_same_path(*change)]
    shards = state["bits"].get("shards", 0)
    if config.exact.shards not in ("auto", shards) and saved.exact.shards == "auto":
        refused.append(Difference("exact.shards", shards, config.exact.shards))
    refused = _without_foreign(refused)
    if refused:
        raise InputError(
            *[f"{where}: {path} = {shown(new)}: this run was started with {shown(old)}" for path, old, new in refused],
            f"a resumed run keeps its experiment: restore these settings, or give another {option}",
        )
    return {path for path, _, _ in changed}


def _without_foreign(refused: list[Difference]) -> list[Difference]:
    """Leave out settings that only one of two networks, losses or data sets has, if their names differ too."""
    renamed = tuple(path.removesuffix("name") for path, _, _ in refused if path.endswith(".name"))
    own = (*renamed, *(f"{section}options." for section in renamed))
    return [
        change
        for change in refused
        if change.path.endswith(".name") or None not in change[1:] or f"{change.path.rpartition('.')[0]}." not in own
    ]


def _is_same_path(setting: str, old: Any, new: Any) -> bool:
    """Whether both are one path, e.g. made absolute for the workers of Ray."""
    return setting == "init_from" and None not in (old, new) and Path(old).resolve() == Path(new).resolve()


def check_init_from(config: TrainConfig) -> None:
    """Raise InputError if `init_from` names no weights or those of a different network. Only for runs yet to start."""
    if config.init_from is None:
        return
    if is_weights_file(config.init_from):
        check_weights_file(config.init_from)
        return
    checkpoint = check_weights_folder(config.init_from)
    check_format(checkpoint)
    model: Any = read_object(checkpoint / STATE)
    for key in ("config", "model", "name"):
        model = model.get(key) if isinstance(model, dict) else None
    # Whether the weights fit an imported network shows only once it is built.
    may_fit = isinstance(model, str) and not {model, config.model.name} & set(BUILT_IN)
    if model != config.model.name and not may_fit:
        raise InputError(
            f"init_from = {config.init_from}: holds weights of {model or 'an unreadable run'}, but model.name = "
            f"{config.model.name}; name another run, or set model.name = {model}"
        )
