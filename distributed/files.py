"""Reads and writes files. Writes are atomic: after a crash at any point the file is either unchanged or complete."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple

from distributed.errors import InputError, StorageError

_MAX_LINE_BYTES = 2**24
_MAX_JSON_BYTES = 2**26
_ABOUT_THE_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EFBIG, errno.ENXIO}
)
"""Errors that say that a regular file is missing. All others, e.g. of a lost mount, say nothing about it."""


class Written(NamedTuple):
    """Size and BLAKE2b digest of a file's bytes."""

    bytes: int
    digest: str


def home_path(text: str | Path) -> Path:
    """Like `with_home`, but return a Path."""
    return Path(with_home(text))


def with_home(text: str | Path) -> str:
    """Return a path with `~` and `~user` expanded as a shell does; the name of an unknown user is left unchanged.

    Raises:
        InputError: it begins with `~` or `~/`, and the home folder is unknown.
    """
    path = os.fspath(os.path.expanduser(text))
    if path.split("/", 1)[0] == "~":
        raise InputError(f"{text}: the home folder is unknown here; give a full path")
    return path


def open_regular(path: str | Path, flags: int) -> int:
    """Like `os.open`, but raise OSError, without blocking, for a pipe, device or socket. An `opener` for `open`."""
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading."""
    return open(open_regular(path, os.O_RDONLY), "rb")


def read_at_most(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raise OSError if it has more than `limit` bytes, without reading all."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size <= limit and len(content := file.read(limit + 1)) <= limit:
            return content
    raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))


def is_unreachable(error: OSError) -> bool:
    """Whether a file is out of reach, e.g. on a lost mount; that does not mean that it is missing or damaged."""
    return error.errno not in _ABOUT_THE_FILE


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text file without line endings, up to a line of 16 MiB; none if it is not a regular file.

    Raises:
        OSError: it is out of reach.
    """
    try:
        file = opened(path)
    except OSError as error:
        if is_unreachable(error):
            raise
        return
    with file:
        while line := file.readline(_MAX_LINE_BYTES):
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                return  # we never write such a line
            yield line.rstrip(b"\r\n").decode(errors="replace")


def digest_of(path: Path) -> Written:
    """Return size and digest of a file."""
    with opened(path) as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return Written(file.tell(), digest.hexdigest())


def digest_of_bytes(content: bytes) -> Written:
    """Return size and digest of a file with this content."""
    return Written(len(content), hashlib.blake2b(content, digest_size=16).hexdigest())


def read_json(path: Path, *, reachable: bool = False) -> Any:
    """Return the file's content, or None if it is missing or not JSON.

    Args:
        reachable: raise OSError if the file is out of reach, which otherwise counts as missing.
    """
    try:
        return json.loads(read_at_most(path, _MAX_JSON_BYTES))
    except OSError as error:
        if reachable and is_unreachable(error):
            raise
    except (ValueError, RecursionError):
        pass
    return None


def read_object(path: Path, *, reachable: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if it holds anything else. `reachable` as for `read_json`."""
    content = read_json(path, reachable=reachable)
    return content if isinstance(content, dict) else {}


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turn an OSError from writing into a StorageError that names the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{error.filename2 or error.filename or folder}: {error.strerror or error}; free disk space or fix permissions, "
            "then rerun the same command"
        ) from error


def replace_text(path: Path, text: str, *, synced: bool = True) -> None:
    """Replace a file's content by the text in UTF-8, as `replace_bytes` does."""
    replace_bytes(path, text.encode(), synced=synced)


def replace_bytes(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Write a temporary file, flush it to the disk if `synced`, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if synced:
            write_synced(temporary, content)
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # e.g. on a file system that has become read-only
            temporary.unlink()
        error.filename, error.filename2 = str(path), None  # a failed write names no file
        raise
    if synced:
        sync_to_disk(path.parent)


def replace_json(path: Path, value: Any, *, synced: bool = True) -> None:
    """Replace a file's content by the value as JSON, as `replace_bytes` does."""
    replace_text(path, json.dumps(value, indent=1) + "\n", synced=synced)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append a line in one write, so that a reader never sees a partial line."""
    with open(path, "a+b", buffering=0, opener=open_regular) as file:
        write_at_once(file, line.encode() + b"\n")


def write_at_once(file: IO[bytes], content: bytes) -> None:
    """Append lines to an unbuffered file that is open for reading too: all of them or, on a full disk, none.

    Raises:
        OSError: it could not be written.
    """
    size = os.fstat(file.fileno()).st_size
    if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a process died while it wrote the last line
        content = b"\n" + content
    if file.write(content) < len(content):
        file.truncate(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))


def sync_to_disk(path: Path) -> None:
    """Make the content of a file, or renames in a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without that operation for folders
            raise
    finally:
        os.close(handle)
