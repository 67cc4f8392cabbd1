"""The checkpoint that a run resumes from: found by rank 0, read by every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed.checkpoint.download import fetch_newest
from distributed.checkpoint.object_store import Store, StoreError
from distributed.checkpoint.snapshot import state_of
from distributed.checkpoint.tensor_file import tensors_of
from distributed.comm import collectives
from distributed.errors import InputError, StorageError
from distributed.files import storing
from distributed.run.checkpoint_layout import newest_whole, set_aside, sweep
from distributed.run.claim import ClaimedRun

Check = Callable[[dict[str, Any], Path], None]
"""Raises InputError if the state.json of that checkpoint is not of this run."""


def find_resume_point(run: ClaimedRun, store: Store | None, check: Check) -> tuple[str, dict[str, Any]] | None:
    """Name and state.json of the newest complete checkpoint, or of the store's; None if the run has saved none yet.

    Newer ones that are damaged are set aside, loudly, but only once the found one is known to fit.

    Raises:
        StorageError: the store does not give what it has, or a damaged one cannot be renamed.
        InputError: it is complete, but not of this run; or none is left of those that the run has saved.
    """
    with storing(run.checkpoints):
        sweep(run.checkpoints)
        path, damaged = newest_whole(run.checkpoints)
        if path is None and store and _fetched(run, store, dict(damaged)):
            path, damaged = newest_whole(run.checkpoints)
        if path is None:
            run.check_not_lost()
            return None
        try:
            content = state_of(path)
        except ValueError as error:
            raise InputError(not_ours(path, error)) from None
        check(content, path)
        run.check_token()
        for other, damage in damaged:
            set_aside(other, damage)
        return path.name, content


def tensors_at(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that rank 0 has found complete.

    Raises:
        StorageError: this rank cannot read them.
        InputError: they are none.
    """
    try:
        return tensors_of(path)
    except ValueError as error:
        raise InputError(not_ours(path, error)) from None
    except OSError as error:
        raise StorageError(
            f"{path}: rank {collectives.rank()} cannot read this checkpoint, which rank 0 found ({error.strerror or error}); "
            "run_dir must be shared storage"
        ) from None


def not_ours(path: Path, error: ValueError) -> str:
    """One line on a checkpoint that is complete and does not fit."""
    return f"{path}: {error}; move it away, or give another --run_dir"


def _fetched(run: ClaimedRun, store: Store, damaged: dict[Path, str]) -> bool:
    """Whether the store gave a checkpoint; it takes the place of a damaged one of its name."""

    def put(aside: Path, path: Path) -> None:
        if path in damaged:
            set_aside(path, damaged[path])
        run.commit(aside, path)

    try:
        return fetch_newest(store, run, put) is not None
    except StoreError as error:
        raise StorageError(f"{error}; nothing was begun: then give the same command again") from error
