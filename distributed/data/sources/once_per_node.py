"""Work that one process per node does while the others wait: downloading, decoding. Imports no torch."""

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from loguru import logger

from distributed.errors import InputError
from distributed.files import read_object, replace_json

_QUIET_SECONDS = 60.0


def once_per_node(target: Path, work: Callable[[], None], *, done: Callable[[], bool], request: str = "") -> None:
    """Call `work` in one process at a time, unless it is `done`; the lock is beside `target`, whose folder is created.

    `done` may be skipped if another process has just replaced the target; the caller checks it.

    A failure ends every process that waited for the same work, with the same message; otherwise each would try and fail in
    turn. A new failure is recognized by its number and not by its time, because a file server's clock may differ from this
    machine's.

    Args:
        request: everything that `work` depends on besides `target`; the failure of another request is not shared.

    Raises:
        InputError: raised by the work, here or in another process.
        OSError: the folder cannot be written, or does not support locks.
    """
    before_work = _stamp(target)
    if done():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    note, lock = (target.with_name(f".{target.name}.{name}") for name in ("failed", "lock"))
    before = read_object(note).get("number")
    try:
        acquired = _acquired(FileLock(lock))
    except NotImplementedError:
        raise OSError(errno.ENOLCK, "its file system has no locks", str(target.parent)) from None
    with acquired:
        # The target of another process: `done`, which may read all of it, would keep the others waiting.
        if _stamp(target) not in (None, before_work) or done():
            return
        failure = read_object(note)
        if failure.get("number") != before and failure.get("request") == request:
            raise InputError(*map(str, failure.get("lines", ["failed in another process"])))
        try:
            work()
        except InputError as error:
            with suppress(OSError):  # on a full disk each process tries on its own
                replace_json(note, {"number": uuid.uuid4().hex, "request": request, "lines": list(error.lines)})
            raise
        with suppress(OSError):
            note.unlink(missing_ok=True)


def _acquired(lock: BaseFileLock) -> AbstractContextManager[BaseFileLock]:
    """Acquire the lock, however long its holder works; after a while warn, in case a dead host left the lock file."""
    try:
        return lock.acquire(timeout=_QUIET_SECONDS)
    except Timeout:
        logger.warning(
            "waiting for another process that downloads or decodes ({}); remove that file only if no such process is left",
            lock.lock_file,
        )
        return lock.acquire(poll_interval=1.0)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is replaced; None if it does not exist."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
