"""Work that one process of a node does while the others wait for it: fetching, decoding. Imports no torch."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from loguru import logger

from distributed.errors import InputError
from distributed.files import read_json, replace_json

_QUIET_SECONDS = 60.0


def once_per_node(target: Path, work: Callable[[], None], *, done: Callable[[], bool]) -> None:
    """Call `work` unless it is `done`, in one process at a time; the lock lies beside `target`, whose folder is made.

    A failure is told to all that waited meanwhile, in the same words: else each would try, and fail, after the other.

    Raises:
        InputError: of the work, or the folder cannot be written.
    """
    if done():
        return
    began, note = time.time(), target.with_name(f".{target.name}.failed")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _acquired(FileLock(target.with_name(f".{target.name}.lock"))):
            if done():
                return
            if note.exists() and note.stat().st_mtime >= began and (lines := read_json(note)):
                raise InputError(*lines)
            note.unlink(missing_ok=True)
            try:
                work()
            except InputError as error:
                replace_json(note, list(error.lines))
                raise
    except OSError as error:
        raise InputError(
            f"{target.parent}: {error.strerror or error}; free space, make it writable, or name another folder"
        ) from None


def _acquired(lock: BaseFileLock) -> AbstractContextManager[BaseFileLock]:
    """The lock, however long its holder works; a lock file that a dead host left is named."""
    try:
        return lock.acquire(timeout=_QUIET_SECONDS)
    except Timeout:
        logger.warning(
            "waiting for the process that holds {}; if it is gone for certain, remove that file", lock.lock_file
        )
        return lock.acquire()
