"""Fetches a file over HTTP: resumed where it broke off, its MD5 checked, complete or absent. Imports no torch."""

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from distributed.data.sources.once_per_node import once_per_node
from distributed.data.sources.progress import progress
from distributed.errors import InputError
from distributed.files import sync_folder

_FOR_GOOD = range(400, 500)  # answers that another try does not change
_BUT_NOT = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE}


class _Failed(Exception):
    """One try at one address failed; `for_good` where another try there is of no use."""

    def __init__(self, why: str, *, for_good: bool = False) -> None:
        super().__init__(why)
        self.for_good = for_good


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    md5: str,
    stall_seconds: float = 30.0,
    rounds: int = 3,
    pause_seconds: float = 2.0,
) -> None:
    """Fetch `target` from the first of `urls` that has it whole; nothing where it is there. One process a node does it.

    What has come lies in `target`.part, and a later try goes on behind it. The addresses are tried in turn, until `rounds`
    times none of them got any further.

    Args:
        stall_seconds: how long a server may send nothing.
        pause_seconds: between two rounds, doubled each time.

    Raises:
        InputError: no address gave the file; a line each with what it gave instead, then the remedy.
    """

    def work() -> None:
        _fetch_in_turn(list(urls), target, md5, stall_seconds, rounds, pause_seconds)

    try:
        once_per_node(target, work, done=target.is_file, request=f"{md5} {' '.join(urls)}")
    except OSError as error:
        raise InputError(
            f"{target.parent}: {error.strerror or error}; free space, make it writable, or name another folder"
        ) from None


def _fetch_in_turn(
    urls: list[str], target: Path, md5: str, stall_seconds: float, rounds: int, pause_seconds: float
) -> None:
    part = target.with_name(f"{target.name}.part")
    whys: dict[str, str] = {}
    if part.is_file() and _md5_of(part) == md5:  # a process died between the last byte and the rename
        _commit(part, target)
        return
    furthest, idle = 0, 0
    while urls and idle < rounds:
        if idle:
            time.sleep(pause_seconds * 2 ** (idle - 1))
        for url in list(urls):
            try:
                _fetch_from(url, part, md5, stall_seconds)
            except _Failed as failure:
                whys[url] = str(failure)
                if failure.for_good:
                    urls.remove(url)
                continue
            _commit(part, target)
            return
        reached = part.stat().st_size if part.is_file() else 0
        furthest, idle = (reached, 0) if reached > furthest else (furthest, idle + 1)
    raise InputError(
        *[f"download of {target.name}: {url}: {why}" for url, why in whys.items()],
        f"download of {target.name}: go online and give the same command again (it goes on where it broke off), name a "
        f"mirror with --data.urls, or put the file into {target.parent} yourself",
    )


def _fetch_from(url: str, part: Path, md5: str, stall_seconds: float) -> None:
    """Complete the part from here. One that was begun elsewhere and turns out wrong is fetched anew once."""
    begun = part.stat().st_size if part.is_file() else 0
    _receive(url, part, begun, stall_seconds)
    if (found := _md5_of(part)) != md5 and begun:
        part.unlink()
        _receive(url, part, 0, stall_seconds)
        found = _md5_of(part)
    if found != md5:
        part.unlink()
        raise _Failed(f"what it gave has MD5 {found}, and {md5} belongs; it was removed", for_good=True)


def _receive(url: str, part: Path, begun: int, stall_seconds: float) -> None:
    """Append to the part what comes behind its first `begun` bytes, or write it anew where the server cannot do that."""
    headers = {"User-Agent": "distributed-alexnet"} | ({"Range": f"bytes={begun}-"} if begun else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=stall_seconds) as answer:
            resumed = answer.status == HTTPStatus.PARTIAL_CONTENT
            if resumed and not str(answer.headers.get("Content-Range", "")).startswith(f"bytes {begun}-"):
                part.unlink()
                raise _Failed("it sent another part than the one asked for")
            length = answer.headers.get("Content-Length")
            start = begun if resumed else 0
            total = start + int(length) if length and length.isdigit() else None
            with (
                _opened(part, "ab" if resumed else "wb") as file,
                progress(part.stem, total, unit="B", start=start) as advance,
            ):
                got = start
                while block := answer.read1(1 << 16):
                    _write(file, block)
                    got += len(block)
                    advance(len(block))
        if total is not None and got < total:
            raise _Failed(f"it broke off after {got:,} of {total:,} bytes")
    except InputError:  # a ValueError, and not the server's
        raise
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # longer than the file: no beginning of it
            part.unlink(missing_ok=True)
        for_good = error.code in _FOR_GOOD and error.code not in _BUT_NOT
        raise _Failed(f"HTTP {error.code} {error.reason}", for_good=for_good) from None
    except TimeoutError:
        raise _Failed(f"it sent nothing for {stall_seconds:g} s") from None
    except urllib.error.URLError as error:
        timed_out = isinstance(error.reason, TimeoutError)
        raise _Failed(f"no answer within {stall_seconds:g} s" if timed_out else f"{error.reason}") from None
    except (http.client.HTTPException, ValueError, OSError) as error:
        raise _Failed(f"{type(error).__name__}: {error}") from None


def _opened(part: Path, mode: str) -> IO[Any]:
    try:
        if part.exists() and not part.is_file():
            raise OSError(errno.EINVAL, "not a regular file")  # a pipe would be waited for
        return part.open(mode)
    except OSError as error:
        raise InputError(
            f"{part}: {error.strerror}; make the folder writable, or name another with --data.root"
        ) from None


def _write(file: IO[Any], block: bytes) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:  # not to be taken for the server's
        raise InputError(
            f"{file.name}: {error.strerror}; free space, or name another folder with --data.root"
        ) from None


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _commit(part: Path, target: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    sync_folder(target.parent)
