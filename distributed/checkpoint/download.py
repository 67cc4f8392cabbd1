"""How a run whose folder has no checkpoint comes back from the store that has them. Imports no torch."""

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.checkpoint.object_store import Store, StoreError, within
from distributed.config import TrainConfig
from distributed.errors import InputError
from distributed.files import read_object
from distributed.run.checkpoint_layout import best_in, check_format, damage_of, point
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.run.resume_checks import changed_settings

PROBE_SECONDS = 60.0  # s3fs gives up on a refused connection after ten


def check_store(config: TrainConfig) -> bool:
    """Look at the store before anything is begun: whether it has a checkpoint to go on from.

    A run that has begun goes on without a store that is away: it only copies.

    Raises:
        InputError: it cannot be used, or holds another experiment.
    """
    store, states = Store(str(config.checkpoint.upload_to)), list[dict[str, Any] | None]()
    here = RunFolder(config.run_dir).newest_state()

    def look() -> None:
        store.probe()
        states.append(store.newest_state())

    try:
        within(PROBE_SECONDS, look, store)
    except StoreError as error:
        if here is None:
            raise InputError(f"checkpoint.upload_to = {error}") from None
        print(f"warning: checkpoint.upload_to = {error}; the run goes on, and each save tries again", file=sys.stderr)
        return False
    if states[0] is None:
        return False
    changed_settings(config, states[0], where=store.url, option="--checkpoint.upload_to")
    if here and _step(states[0]) > _step(here):
        print(
            f"warning: {store.url} has step {_step(states[0])}, and the run goes on from step {_step(here)}, the newest in "
            f"{config.run_dir}; to go on from the other, give an empty --run_dir", file=sys.stderr,
        )  # fmt: skip
    return True


def _step(state: dict[str, Any]) -> int:
    counters = state.get("state")
    step = counters.get("step") if isinstance(counters, dict) else None
    return step if isinstance(step, int) else 0


def fetch_newest(store: Store, run: ClaimedRun, commit: Callable[[Path, Path], None]) -> str | None:
    """Bring the newest complete checkpoint into the run folder, and the best that it knows of; its name.

    Args:
        commit: renames a folder into its place.

    Raises:
        StoreError, InputError: the store did not give it.
    """
    folder = run.checkpoints
    for name in reversed(store.names()):
        if (aside := _fetched(store, folder, name)) is None:
            continue
        best = best_in(read_object(aside / "state.json"))
        if best is not None and best != name:
            if (aside_best := _fetched(store, folder, best)) is not None:
                commit(aside_best, folder / best)
                run.try_cleanup("the link best was not set", partial(point, folder, "best", best))
            else:
                logger.warning("{} has no whole {}, the best checkpoint so far", store.url, best)
        commit(aside, folder / name)  # not flushed to the disk: what a power cut damages is fetched again
        run.try_cleanup("the link latest was not set", partial(point, folder, "latest", name))
        return name
    return None


def _fetched(store: Store, folder: Path, name: str) -> Path | None:
    """A whole checkpoint of the store, in a folder that is swept away where nobody renames it."""
    if not store.is_whole(name):
        return None
    logger.info("fetching {}/{}", store.url, name)
    aside = folder / f".writing-{name}"
    store.fetch(name, aside)
    try:
        check_format(aside)
    except InputError as error:
        raise StoreError(str(error)) from None
    damage = damage_of(aside)
    if damage is None:
        return aside
    shutil.rmtree(aside, ignore_errors=True)
    logger.error("{}/{} is damaged ({}): its manifest is set aside as manifest.json.damaged", store.url, name, damage)
    with suppress(StoreError):
        store.set_aside(name)
    return None
