"""Cache files of decoded images, whose owner and content are verified. Imports no torch."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from distributed.host.cpu_quota import available_cpus
from distributed.host.identity import boot_id

T = TypeVar("T")
Pixels = NDArray[np.uint8]

FORMAT = 3  # of the file and of the pixels: increase it when `to_size` or the decoder's options change
_HEADER = 4096  # bytes, one page, so that the pixels after it can be mapped
BLOCK = 64  # images that are decoded, written and verified together
_ASIDE = ".writing"
_OLD_SECONDS = 7 * 24 * 3600.0
_NOT_ABOUT_THE_FILE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(Exception):
    """A cache file exists but is not used; the message says why."""


class Folder(NamedTuple):
    """A folder that only this user can write to, and the user's id there."""

    path: Path
    owner: int


def folders(root: Path, named: Path | None) -> Iterator[Folder]:
    """Yield folders for decoded images, best first: the named one, else in the data's, user's and temporary folders.

    If others can write to one of them, a private folder is created inside.
    """
    private = f"distributed-decoded-{os.geteuid()}"
    for folder in [named] if named else [root / ".decoded", *_of_the_user(private)]:
        for candidate in (folder, folder / private):
            if own := _own(candidate, may_be_link=candidate == named):
                yield own
                break


def _of_the_user(private: str) -> Iterator[Path]:
    with suppress(RuntimeError):  # a container's user without a name
        yield Path.home() / ".cache" / "distributed" / "decoded"
    with suppress(OSError):  # no folder for temporary files can be written
        yield Path(tempfile.gettempdir()) / private


def _own(folder: Path, *, may_be_link: bool) -> Folder | None:
    """Return the folder, created if it is missing; None if it cannot be written, or others can write to it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.stat() if may_be_link else folder.lstat()
        with tempfile.TemporaryFile(dir=folder) as file:
            owner = os.fstat(file.fileno()).st_uid  # a file server may map this user to another id
    except OSError:
        return None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & _OTHERS_WRITE
    return Folder(folder, owner) if is_own else None


@dataclass(frozen=True)
class CacheFile:
    """The decoded images of one split: a JSON header, then uint8 [n, side, side, 3].

    Args:
        owner: the id of the only user whose file is trusted.
        source: identifies the decoded files and their order.
    """

    path: Path
    owner: int
    shape: tuple[int, int, int, int]
    source: str

    def load(self) -> Pixels | None:
        """Return the images, mapped; None if the file does not exist.

        Raises:
            Untrusted: it is another user's, from another source, or damaged.
            OSError: it cannot be read now.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with open(os.open(self.path, flags), "rb") as file:
                self._check_owner(os.fstat(file.fileno()))
                header = file.read(_HEADER)
                # Read-only: Linux refuses a private mapping that can be written ("c") and exceeds memory and swap.
                images = np.memmap(file, np.uint8, "r", _HEADER, self.shape)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_ABOUT_THE_FILE:
                raise
            raise Untrusted(getattr(error, "strerror", None) or str(error)) from None
        if header != self._header(_digest(images)):
            raise Untrusted("its content does not match its header")
        return images

    def _check_owner(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise Untrusted("not a regular file")
        if found.st_uid != self.owner or found.st_mode & _OTHERS_WRITE:
            raise Untrusted("another user can write it")
        if found.st_size != _HEADER + int(np.prod(self.shape, dtype=np.int64)):
            raise Untrusted("its size is wrong")

    def _header(self, digest: str) -> bytes:
        content = {"format": FORMAT, "shape": self.shape, "source": self.source, "digest": digest}
        return json.dumps(content).encode().ljust(_HEADER, b"\n")

    def write(self, blocks: Callable[[Callable[[int, Pixels], None]], None]) -> None:
        """Write a temporary file and rename it once it is complete.

        Args:
            blocks: calls its argument, from any thread, with the index of each block's first image and the block.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self._remove_leftovers()
        handle, aside = tempfile.mkstemp(_ASIDE, f".{self.path.name}.{boot_id()}.", self.path.parent)
        digests: dict[int, bytes] = {}

        def store(first: int, images: Pixels) -> None:
            # Not into mapped memory: on a full disk that kills the process.
            _write_at(handle, images.tobytes(), _HEADER + first * images[0].nbytes)
            digests[first] = _digest_of_block(images)

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._reserve(handle)
            blocks(store)
            _write_at(handle, self._header(_joined(digests[first] for first in sorted(digests))), 0)
            with suppress(Untrusted):
                # Another node's, whose lock is not visible here; its processes have mapped it.
                if self.load() is not None:
                    os.unlink(aside)
                    return
            os.replace(aside, self.path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    def _reserve(self, handle: int) -> None:
        """Reserve the disk space before hours of decoding, if the file system can."""
        try:
            os.posix_fallocate(handle, 0, _HEADER + int(np.prod(self.shape, dtype=np.int64)))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes; a running process has locked its own.

        The lock of another machine may not be visible here, so its file is removed only if it is old.
        """
        for path in self.path.parent.glob(f".*{_ASIDE}"):
            with suppress(OSError), path.open("r+b") as file:  # NFS locks only a file opened for writing
                is_old = time.time() - os.fstat(file.fileno()).st_mtime > _OLD_SECONDS
                if is_old or f".{boot_id()}." in path.name:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def in_threads(work: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield, in order, the result of `work` for the index of each block's first image; `work` should release the GIL."""
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="images") as threads:
        yield from threads.map(work, range(0, count, BLOCK))


def _digest(images: Pixels) -> str:
    return _joined(in_threads(lambda first: _digest_of_block(images[first : first + BLOCK]), len(images)))


def _digest_of_block(images: Pixels) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(images).data, digest_size=16).digest()


def _joined(digests: Iterator[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _write_at(handle: int, content: bytes, at: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(handle, rest, at)
        rest, at = rest[written:], at + written
