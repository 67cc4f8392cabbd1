"""Resumes a run whose folder has no checkpoint from the store. Imports no torch."""

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.checkpoint.object_store import Store, StoreError, call_with_timeout
from distributed.config import TrainConfig
from distributed.errors import InputError
from distributed.files import sync_to_disk
from distributed.run.checkpoint_changes import set_link
from distributed.run.checkpoint_layout import (
    BEST,
    DAMAGED_MANIFEST,
    LATEST,
    SavedState,
    best_known_to,
    check_format,
    damage_of,
    step_of,
    unfinished,
)
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.run.resume_checks import changed_settings

PROBE_SECONDS = 60.0  # s3fs gives up on a refused connection after ten


def store_has_run(config: TrainConfig, saved: SavedState | None) -> bool:
    """Probe the store before anything starts, and return whether it has a checkpoint to resume from.

    If the run has saved locally, an unavailable store is only a warning, because the run only copies to it.

    Args:
        saved: the run folder's newest saved state.

    Raises:
        InputError: the store cannot be used, or holds a different experiment.
    """
    store = Store(str(config.checkpoint.upload_to))

    def probe() -> dict[str, Any] | None:
        store.probe()
        return store.newest_state()

    try:
        remote = call_with_timeout(PROBE_SECONDS, probe, store)
    except StoreError as error:
        if saved is None:
            raise InputError(f"checkpoint.upload_to = {error}") from None
        print(f"warning: checkpoint.upload_to = {error}; the run continues, and each save tries again", file=sys.stderr)
        return False
    if remote is None:
        return False
    changed_settings(config, remote, where=store.url, option="--checkpoint.upload_to")
    there, here = step_of(remote) or 0, step_of(saved and saved.content) or 0
    if saved and there > here:
        print(
            f"warning: {store.url} has step {there}, but the run resumes from step {here}, the newest "
            f"in {config.run_dir}; to resume from the store, give an empty --run_dir", file=sys.stderr,
        )  # fmt: skip
    return True


def saved_content(config: TrainConfig) -> dict[str, Any] | None:
    """Return the content of the run's newest state.json, from its folder or else from its store; None if it has not saved.

    Raises:
        InputError: the store cannot be read.
    """
    content = RunFolder(config.run_dir).newest_state()
    if content is None and config.checkpoint.upload_to:
        store = Store(config.checkpoint.upload_to)
        try:
            return call_with_timeout(PROBE_SECONDS, store.newest_state, store)
        except StoreError as error:
            raise InputError(f"checkpoint.upload_to = {error}") from None
    return content


def download_newest(store: Store, run: ClaimedRun, commit: Callable[[Path, Path], None]) -> str | None:
    """Download the newest complete checkpoint, and the best one it knows of, into the run folder.

    Args:
        commit: renames a folder to its final path.

    Returns:
        The name of the newest complete checkpoint, or None if the store has none.

    Raises:
        StoreError, InputError: the store failed.
    """
    folder = run.checkpoints
    for name in reversed(store.names()):
        if damage_of(folder / name) is None:
            return name
        if (aside := _download(store, folder, name)) is None:
            continue
        best = best_known_to(aside)
        if best is not None and best != name and damage_of(folder / best) is not None:
            if (aside_best := _download(store, folder, best)) is not None:
                commit(aside_best, folder / best)
                run.try_cleanup("the link best was not set", partial(set_link, folder, BEST, best))
            else:
                logger.warning("{} has no complete {}, the best checkpoint so far", store.url, best)
        commit(aside, folder / name)
        run.try_cleanup("the link latest was not set", partial(set_link, folder, LATEST, name))
        return name
    return None


def _download(store: Store, folder: Path, name: str) -> Path | None:
    """Download a checkpoint into a temporary folder and return that, or None if the checkpoint is incomplete or damaged."""
    if not store.is_committed(name):
        return None
    logger.info("downloading {}/{}", store.url, name)
    aside = unfinished(folder, name)
    store.download(name, aside)
    try:
        check_format(aside)
    except InputError as error:
        raise StoreError(str(error)) from None
    damage = damage_of(aside)
    if damage is None:
        for file in aside.iterdir():
            sync_to_disk(file)
        return aside
    shutil.rmtree(aside, ignore_errors=True)
    logger.error("{}/{} is damaged ({}): its manifest is set aside as {}", store.url, name, damage, DAMAGED_MANIFEST)
    with suppress(StoreError):
        store.set_aside(name)
    return None
