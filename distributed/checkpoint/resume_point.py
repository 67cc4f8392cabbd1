"""The checkpoint that a run resumes from: found by rank 0, read by every rank."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from distributed.checkpoint.download import download_newest
from distributed.checkpoint.object_store import Store, StoreError
from distributed.checkpoint.snapshot import read_state
from distributed.checkpoint.tensor_file import read_tensors
from distributed.comm import collectives
from distributed.errors import InputError, StorageError
from distributed.files import storing
from distributed.run.checkpoint_changes import delete_unfinished, set_aside
from distributed.run.checkpoint_layout import TENSORS, WRITING, check_formats, newest_complete, parse_name
from distributed.run.claim import ClaimedRun

_VISIBLE_SECONDS = 65.0
"""How late a network file system may show a folder that another node has made: NFS keeps attributes for up to 60 s."""

Validate = Callable[[dict[str, Any], Path], None]
"""Raises InputError if the content of this checkpoint's state.json does not belong to the run."""


class ResumePoint(NamedTuple):
    """The name of a checkpoint and the content of its state.json."""

    name: str
    content: dict[str, Any]


def find_resume_point(run: ClaimedRun, store: Store | None, validate: Validate) -> ResumePoint | None:
    """Find the newest complete checkpoint, downloading it if only the store has one.

    Newer damaged checkpoints are set aside, but only after the found one has passed `validate`.

    Returns:
        None if the run has not saved yet.

    Raises:
        StorageError: the store cannot be read, or a damaged checkpoint cannot be renamed.
        InputError: the checkpoint is complete but not this run's, or the run has saved and no checkpoint is left.
    """
    with storing(run.checkpoints):
        check_formats(run.checkpoints)  # or those of a newer version would be set aside as damaged
        newest = newest_complete(run.checkpoints)
        wanted = newest.checkpoint is None or _was_downloading_after(newest.checkpoint)
        if wanted and store and _download(run, store, newest.damaged):
            newest = newest_complete(run.checkpoints)
        delete_unfinished(run.checkpoints)
        path = newest.checkpoint
        if path is None:
            run.check_not_lost()
            return None
        try:
            content = read_state(path)
        except ValueError as error:
            raise InputError(mismatch(path, error)) from None
        validate(content, path)
        run.check_token()
        for other, damage in newest.damaged.items():
            set_aside(other, damage)
        return ResumePoint(path.name, content)


def _was_downloading_after(newest: Path) -> bool:
    """Whether an attempt was killed while it downloaded a later checkpoint: it commits the best one before the newest."""
    own = parse_name(newest.name)
    places = [parse_name(path.name.removeprefix(WRITING)) for path in newest.parent.glob(f"{WRITING}*")]
    return own is not None and any(place > own for place in places if place)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint that rank 0 has found complete.

    Raises:
        StorageError: this rank cannot read them.
        InputError: the file is not in safetensors format.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while _is_missing(path / TENSORS) and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        return read_tensors(path)
    except ValueError as error:
        raise InputError(mismatch(path, error)) from None
    except OSError as error:
        raise StorageError(
            f"{path}: rank {collectives.rank()} cannot read this checkpoint, which rank 0 found ({error.strerror or error}); "
            "run_dir must be shared storage"
        ) from None


def _is_missing(file: Path) -> bool:
    """Whether there is no such file; False if that is unknown, e.g. without permission."""
    try:
        os.stat(file)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def mismatch(path: Path, error: ValueError) -> str:
    """Return the one-line message about a checkpoint that is complete but does not fit the run."""
    return f"{path}: {error}; move it away, or give another --run_dir"


def _download(run: ClaimedRun, store: Store, damaged: dict[Path, str]) -> bool:
    """Download the store's newest checkpoint, replacing a damaged one of the same name. Returns whether there was one."""

    def commit(aside: Path, path: Path) -> None:
        if path in damaged:
            set_aside(path, damaged[path])
        run.commit(aside, path)

    try:
        return download_newest(store, run, commit) is not None
    except StoreError as error:
        raise StorageError(f"{error}; then rerun the same command: the run has not started") from error
