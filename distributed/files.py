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

_LONGEST_LINE = 2**24
_LONGEST_JSON = 2**26
_LONGEST_OUTPUT = 230  # bytes of a name; it is written under a longer one first


class Written(NamedTuple):
    """Size and BLAKE2b digest of a file's bytes."""

    bytes: int
    digest: str


def home_path(text: str | Path) -> Path:
    """The path that `with_home` gives."""
    return Path(with_home(text))


def with_home(text: str | Path) -> str:
    """A path with `~` and `~user` expanded as a shell does it: a user that does not exist leaves the name as it is.

    Raises:
        InputError: `~` or `~/...`, and nobody knows the home folder.
    """
    path = os.fspath(os.path.expanduser(text))
    if path.split("/", 1)[0] == "~":
        raise InputError(f"{text}: the home folder is not known here; give a full path")
    return path


def open_regular(path: str | Path, flags: int) -> int:
    """`os.open` of a regular file; a pipe, device or socket is an OSError, and not waited for. An `opener` for `open`."""
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def opened(path: Path) -> BufferedReader:
    """A regular file to read."""
    return open(open_regular(path, os.O_RDONLY), "rb")


def read_at_most(path: Path, limit: int) -> bytes:
    """The content of a regular file; one of more bytes than `limit` is an OSError, before it takes memory."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size <= limit and len(content := file.read(limit + 1)) <= limit:
            return content
    raise OSError(errno.EFBIG, f"more than {limit:,} bytes", str(path))


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text without their ends, up to one of 16 MiB; none if there is no regular file."""
    if not os.path.isfile(path):
        return
    with opened(path) as file:
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                return  # no writer of ours makes such a line
            yield line.rstrip(b"\r\n").decode(errors="replace")


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
        return json.loads(read_at_most(path, _LONGEST_JSON))
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
            f"{error.filename2 or error.filename or folder}: {error.strerror or error}; free disk space or fix permissions, "
            "then rerun the same command"
        ) from error


def replace_text(path: Path, text: str, *, synced: bool = True) -> None:
    """`replace_bytes` of the text in UTF-8."""
    replace_bytes(path, text.encode(), synced=synced)


def replace_bytes(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Write aside, flush to the disk if `synced`, then rename into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if synced:
            write_synced(aside, content)
        else:
            aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None  # a failed write names no file
        raise
    if synced:
        sync_folder(path.parent)


def replace_json(path: Path, value: Any, *, synced: bool = True) -> None:
    """`replace_text` of the value as JSON."""
    replace_text(path, json.dumps(value, indent=1) + "\n", synced=synced)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append in one write, so that a reader never sees half a line."""
    with open(path, "ab", buffering=0, opener=open_regular) as file:
        file.write(line.encode() + b"\n")


def sync_folder(path: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(option: str, path: Path, *, regular: bool = False) -> None:
    """Make the folder of a file that a command will write.

    Args:
        regular: refuse devices and pipes too.

    Raises:
        InputError: it cannot be made or written, or the path is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of(path)
        if mode is None:
            if len(os.fsencode(path.name)) > _LONGEST_OUTPUT:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            os.stat(folder := os.path.dirname(os.path.realpath(path)))  # a link may lead to a missing folder
        elif stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        elif not (stat.S_ISREG(mode) or (not regular and (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)))):
            raise OSError(errno.EINVAL, "is not a regular file")
        if not os.access(path if mode is not None else folder, os.W_OK):
            raise PermissionError(errno.EACCES, "may not be written")
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}; name a file that can be written") from None


def write_output(path: Path, content: bytes) -> None:
    """Replace a regular file, or the one that a link leads to; write straight into a device or a pipe.

    Raises:
        OSError: it cannot be written, or nobody reads the pipe.
    """
    mode, target = _mode_of(path), Path(os.path.realpath(path))
    if (mode is None or stat.S_ISREG(mode)) and os.access(target.parent, os.W_OK):
        replace_bytes(target, content)
        return
    handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)  # ENXIO if nobody reads a pipe
    os.set_blocking(handle, True)
    with open(handle, "wb") as file:
        file.write(content)


def _mode_of(path: Path) -> int | None:
    """The type of a file, or of what a link leads to; None if there is none."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
