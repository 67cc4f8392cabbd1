"""Downloads a file over HTTP, resuming after interruptions and verifying the MD5. Imports no torch."""

import errno
import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from distributed.data.sources.once_per_node import once_per_node
from distributed.data.sources.progress import progress
from distributed.errors import InputError
from distributed.files import sync_to_disk

_BLOCK_BYTES = 1 << 16
_PERMANENT = range(400, 500)  # statuses that a retry does not change
_TEMPORARY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE}


class _Failed(Exception):
    """A try at an address failed; if `permanent`, a retry would fail too."""

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    md5: str,
    stall_seconds: float = 30.0,
    rounds: int = 3,
    pause_seconds: float = 2.0,
) -> None:
    """Download `target` from the first of `urls` that serves it completely, in one process per node, unless it exists.

    Partial downloads are kept in `target`.part and resumed. The addresses are tried in turn until none of them has made
    progress in `rounds` consecutive rounds.

    Args:
        stall_seconds: timeout while a server sends nothing.
        pause_seconds: pause between two rounds, doubled each time.

    Raises:
        InputError: no address served the file; one line per address with the reason, then the remedy.
    """

    def work() -> None:
        _fetch_in_turn(list(urls), target, md5, stall_seconds, rounds, pause_seconds)

    try:
        once_per_node(target, work, done=target.is_file, request=f"{md5} {' '.join(urls)}")
    except OSError as error:
        raise InputError(
            f"{target.parent}: {error.strerror or error}; free disk space, make it writable, or name another folder"
        ) from None


def _fetch_in_turn(
    urls: list[str], target: Path, md5: str, stall_seconds: float, rounds: int, pause_seconds: float
) -> None:
    partial = target.with_name(f"{target.name}.part")
    reasons: dict[str, str] = {}
    if partial.is_file() and _md5_of(partial) == md5:  # a process died between the last byte and the rename
        _commit(partial, target)
        return
    furthest, idle = 0, 0
    while urls and idle < rounds:
        if idle:
            time.sleep(pause_seconds * 2 ** (idle - 1))
        for url in list(urls):
            try:
                _fetch_from(url, partial, md5, stall_seconds)
            except _Failed as failure:
                reasons[url] = str(failure)
                if failure.permanent:
                    urls.remove(url)
                continue
            _commit(partial, target)
            return
        reached = partial.stat().st_size if partial.is_file() else 0
        furthest, idle = (reached, 0) if reached > furthest else (furthest, idle + 1)
    raise InputError(
        *[f"download of {target.name}: {url}: {reason}" for url, reason in reasons.items()],
        f"download of {target.name}: go online and rerun the same command (the download resumes), name a mirror with "
        f"--data.urls, or put the file into {target.parent} yourself",
    )


def _fetch_from(url: str, partial: Path, md5: str, stall_seconds: float) -> None:
    """Complete the partial file from this address. If its MD5 is wrong, start over once without the earlier bytes."""
    offset = partial.stat().st_size if partial.is_file() else 0
    _receive(url, partial, offset, stall_seconds)
    if (found := _md5_of(partial)) != md5 and offset:
        partial.unlink()
        _receive(url, partial, 0, stall_seconds)
        found = _md5_of(partial)
    if found != md5:
        partial.unlink()
        raise _Failed(f"the file it sent has MD5 {found}, expected {md5}; the file was removed", permanent=True)


def _receive(url: str, partial: Path, offset: int, stall_seconds: float) -> None:
    """Append the bytes from `offset` on, or start over if the server ignores ranges."""
    with _server_errors(partial, stall_seconds), _response(url, offset, stall_seconds) as response:
        start = _first_byte(response, partial, offset)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        received = _append(response, partial, start, total)
    if total is not None and received < total:
        raise _Failed(f"the connection broke after {received:,} of {total:,} bytes")


def _response(url: str, offset: int, stall_seconds: float) -> Any:
    """Request the file from byte `offset` on."""
    headers = {"User-Agent": "distributed-alexnet"} | ({"Range": f"bytes={offset}-"} if offset else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=stall_seconds)


def _first_byte(response: Any, partial: Path, offset: int) -> int:
    """Return the position of the response's first byte: `offset`, or 0 if the server sends the entire file."""
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        return 0
    if not str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-"):
        partial.unlink()
        raise _Failed("it sent a different range from the one requested")
    return offset


def _append(response: Any, partial: Path, start: int, total: int | None) -> int:
    """Write the response to the file from `start` on; return the file's size after it."""
    received = start
    with (
        _opened(partial, "ab" if start else "wb") as file,
        progress(partial.stem, total, unit="B", start=start) as advance,
    ):
        while block := response.read1(_BLOCK_BYTES):
            _write(file, block)
            received += len(block)
            advance(len(block))
    return received


@contextmanager
def _server_errors(partial: Path, stall_seconds: float) -> Iterator[None]:
    """Turn every error of the server or the network into `_Failed`; errors of the disk, as InputError, pass through."""
    try:
        yield
    except InputError:  # also a ValueError
        raise
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the partial file is longer than the file
            partial.unlink(missing_ok=True)
        permanent = error.code in _PERMANENT and error.code not in _TEMPORARY
        raise _Failed(f"HTTP {error.code} {error.reason}", permanent=permanent) from None
    except TimeoutError:
        raise _Failed(f"it sent nothing for {stall_seconds:g} s") from None
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        raise _Failed(f"no answer within {stall_seconds:g} s" if timed_out else f"{error.reason}") from None
    except (http.client.HTTPException, ValueError, OSError) as error:
        raise _Failed(f"{type(error).__name__}: {error}") from None


def _opened(partial: Path, mode: str) -> IO[Any]:
    try:
        if partial.exists() and not partial.is_file():
            raise OSError(errno.EINVAL, "not a regular file")  # opening a pipe would block
        return partial.open(mode)
    except OSError as error:
        raise InputError(
            f"{partial}: {error.strerror}; make the folder writable, or name another with --data.root"
        ) from None


def _write(file: IO[Any], block: bytes) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:  # not an error of the server
        raise InputError(
            f"{file.name}: {error.strerror}; free disk space, or name another folder with --data.root"
        ) from None


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _commit(partial: Path, target: Path) -> None:
    """Rename the complete file into place, durably."""
    sync_to_disk(partial)
    partial.replace(target)
    sync_to_disk(target.parent)
