"""Files that a command was asked to write, e.g. with --out. Imports no torch."""

import errno
import os
import stat
from pathlib import Path

from distributed.errors import InputError
from distributed.files import replace_bytes

_MAX_NAME_BYTES = 230  # the file is first written under a longer name


def check_writable(option: str, path: Path, *, regular: bool = False, suffix: str = "") -> None:
    """Create the folder of a file that a command is about to write, and check that the file can be written.

    Args:
        regular: refuse devices and pipes too.
        suffix: refuse names that end in another one.

    Raises:
        InputError: the folder cannot be created, the file cannot be written, the path is a folder, or its suffix is wrong.
    """
    if suffix and path.suffix.lower() not in ("", suffix):
        raise InputError(f"{option} {path}: would be a {suffix} file; name one that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of(path)
        if mode is None:
            if len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
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
    """Replace a regular file, or the target of a link; write into a device or a pipe directly.

    Raises:
        OSError: it cannot be written, or the pipe has no reader.
    """
    mode, target = _mode_of(path), Path(os.path.realpath(path))
    if (mode is None or stat.S_ISREG(mode)) and os.access(target.parent, os.W_OK):
        replace_bytes(target, content)
        return
    handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)  # ENXIO if a pipe has no reader
    os.set_blocking(handle, True)
    with open(handle, "wb") as file:
        file.write(content)


def _mode_of(path: Path) -> int | None:
    """Return the mode of a file or of a link's target; None if it does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
