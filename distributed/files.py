"""Files that are either as they were or complete, whatever dies in between."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from distributed.errors import InputError, StorageError


class Written(NamedTuple):
    """Size and BLAKE2b digest of a file's bytes."""

    bytes: int
    digest: str


def opened(path: Path) -> BufferedReader:
    """A file to read; a pipe or a device is an OSError, and not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def digest_of(path: Path) -> Written:
    """Size and digest of a file as it is on the disk."""
    with opened(path) as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return Written(file.tell(), digest.hexdigest())


def digest_of_bytes(content: bytes) -> Written:
    """Size and digest of what would be a file's content."""
    return Written(len(content), hashlib.blake2b(content, digest_size=16).hexdigest())


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no such file or it is no JSON."""
    try:
        with opened(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of an object; empty where it is anything else."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """What the system refuses to write is a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{error.filename2 or error.filename or folder}: {error.strerror or error}; free space or mend access, then "
            "give the same command again"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of the text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write aside, flush to the disk, then rename into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_synced(aside, content)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None  # a failed write names no file
        raise
    sync_folder(path.parent)


def replace_json(path: Path, value: Any) -> None:
    """`replace_text` of the value as JSON."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def write_output(path: Path, content: bytes) -> None:
    """`replace_bytes` of a file that a command was asked for; through a link, and into a device or pipe."""
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK)):
        target.write_bytes(content)
    else:
        replace_bytes(target, content)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append in one write, so that a reader never sees half a line."""
    with path.open("ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


def sync_folder(path: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(option: str, path: Path) -> None:
    """Make the folder of a file that a command will write.

    Raises:
        InputError: it cannot be made or written, or the path is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "may not be written")
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}; name a file that can be written") from None
