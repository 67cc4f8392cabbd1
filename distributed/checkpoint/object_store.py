"""Checkpoints in an object store, or anywhere else that fsspec reaches by URL. Imports no torch.

    URL/step-00000313-epoch-001/    the same files as in a run folder
    URL/attempt.json                the attempt that may write

A checkpoint without a manifest does not exist: the manifest is uploaded last and removed first. This module only
implements the operations; `upload` and `download` decide when to use them.
"""

import errno
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from distributed.errors import InputError
from distributed.files import digest_of_bytes
from distributed.process.deadline import call_within
from distributed.run.checkpoint_layout import DAMAGED_MANIFEST, FILES, MANIFEST, STATE, is_intact, sort_names

T = TypeVar("T")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


class StoreError(Exception):
    """A request to a store failed. The message is one line with the URL and the remedy."""


class Store:
    """The checkpoints under a URL. Every method raises StoreError if the store fails."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The fsspec file system for the URL's scheme, and the URL as a path in it.

        Raises:
            InputError: its package is not installed.
        """
        scheme = self.url.partition(":")[0]
        try:
            import fsspec.core  # takes a third of a second, so only when a store is used

            # Without caches: neither listings nor credentials of an earlier environment may be remembered.
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            if scheme == "file":
                options["auto_mkdir"] = True
            file_system, path = fsspec.core.url_to_fs(self.url, **options)
            return file_system, str(path)
        except ImportError as error:
            package = _PACKAGES.get(scheme, "fsspec")
            raise InputError(
                f"checkpoint.upload_to = {self.url}: {scheme}:// needs the package {package} ({error}): pip install {package}"
            ) from None
        except Exception as error:
            raise StoreError(f"{self.url}: {self._explain(error)}") from error

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    def probe(self) -> None:
        """Write, read and remove a tiny object."""
        path, content = self._path(f".probe-{uuid.uuid4().hex}"), b"probe"
        with self._store_errors():
            self._fs.pipe_file(path, content)
            found = self._fs.cat_file(path)
            self._fs.rm_file(path)
        if found != content:
            raise StoreError(f"{self.url}: returned different bytes than were written; name another store")

    def names(self) -> list[str]:
        """Return the names of all checkpoints whose upload began and that were not removed, oldest first."""
        with self._store_errors():
            try:
                entries = self._fs.ls(self._path(), detail=False)
            except FileNotFoundError:
                return []
        return sort_names(Path(entry).name for entry in entries)

    def is_committed(self, name: str) -> bool:
        """Whether its upload finished. Does not check its files."""
        return self._read(name, MANIFEST) is not None

    def has(self, checkpoint: Path) -> bool:
        """Whether the store has this local checkpoint: an identical manifest, and files of the sizes in it."""
        manifest = (checkpoint / MANIFEST).read_bytes()
        if self._read(checkpoint.name, MANIFEST) != manifest:
            return False
        with self._store_errors():
            entries = self._fs.ls(self._path(checkpoint.name), detail=True)
        sizes = {Path(entry["name"]).name: entry["size"] for entry in entries}
        return all(sizes.get(name) == size for name, (size, _) in json.loads(manifest)["files"].items())

    def newest_state(self) -> dict[str, Any] | None:
        """Return the content of the newest intact state.json."""
        for name in reversed(self.names()):
            manifest, state = self._read(name, MANIFEST), self._read(name, STATE) or b""
            content = _json_object(state)
            if is_intact(_json_object(manifest), content, digest_of_bytes(state)):
                return content
        return None

    def upload(self, checkpoint: Path) -> None:
        """Upload all files, the manifest last. An earlier checkpoint of this name is invalid from the first byte on."""
        name = checkpoint.name
        with self._store_errors(local=checkpoint):
            self._remove_file(name, MANIFEST)
            for file in (*FILES, MANIFEST):
                self._fs.put_file(str(checkpoint / file), self._path(name, file))

    def download(self, name: str, folder: Path) -> None:
        """Download a checkpoint's files into a new folder, without checking them."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with self._store_errors(local=folder):
            for file in (*FILES, MANIFEST):
                with suppress(FileNotFoundError):
                    self._fs.get_file(self._path(name, file), str(folder / file))

    def set_aside(self, name: str) -> None:
        """Invalidate a damaged checkpoint by renaming its manifest."""
        manifest = self._read(name, MANIFEST)
        with self._store_errors():
            self._fs.pipe_file(self._path(name, DAMAGED_MANIFEST), manifest or b"")
            self._remove_file(name, MANIFEST)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first, so that an interrupted removal leaves no valid checkpoint."""
        with self._store_errors():
            self._remove_file(name, MANIFEST)
            for entry in self._fs.ls(self._path(name), detail=False):
                self._remove_file(name, Path(entry).name)
            if self.url.startswith("file:"):  # elsewhere an empty folder does not exist
                self._fs.rmdir(self._path(name))

    def claim(self, holder: dict[str, Any]) -> None:
        """Record which attempt may write from now on."""
        with self._store_errors():
            self._fs.pipe_file(self._path("attempt.json"), json.dumps(holder, indent=1).encode())

    def holder(self) -> dict[str, Any]:
        """Return the record of the attempt that claimed the store last; empty if there is none."""
        return _json_object(self._read("attempt.json"))

    def _path(self, *names: str) -> str:
        return "/".join((self._opened[1], *names))

    def _read(self, *names: str) -> bytes | None:
        with self._store_errors():
            try:
                return bytes(self._fs.cat_file(self._path(*names)))
            except FileNotFoundError:
                return None

    def _remove_file(self, *names: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(*names))

    @contextmanager
    def _store_errors(self, local: Path | None = None) -> Iterator[None]:
        """Turn all errors into StoreError, because each file system raises its own kinds.

        Args:
            local: a folder of this machine whose files are read or written.
        """
        try:
            yield
        except (InputError, StoreError):
            raise
        except Exception as error:
            if local and _concerns(error, local):
                reason = getattr(error, "strerror", None) or type(error).__name__
                raise StoreError(f"{local}: {reason}; free disk space there, or fix permissions") from error
            raise StoreError(f"{self.url}: {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        kind, first = type(error).__name__, next(iter(str(error).splitlines()), "")
        detail = f"{kind}: {first}" if first not in ("", "None") else kind
        if self.url.startswith("file:"):
            return f"{getattr(error, 'strerror', None) or detail}; fix permissions, free space, or name another folder"
        if isinstance(error, FileNotFoundError):
            return f"no such bucket ({detail}); create it, or name another with --checkpoint.upload_to"
        if isinstance(error, PermissionError) or "credential" in kind.lower():
            return f"no permission to read, write and remove ({detail}); set other credentials, see docs/storage.md"
        return f"{detail}; check the network and the store's endpoint"


def call_with_timeout(seconds: float, work: Callable[[], T], store: Store) -> T:
    """Return the result of `work`, which accesses the store and may hang.

    Raises:
        StoreError: it took longer than `seconds`.
    """
    try:
        return call_within(seconds, work)
    except TimeoutError:
        raise StoreError(
            f"{store.url}: no answer within {seconds:g} s; check the network and the store's endpoint"
        ) from None


def _concerns(error: Exception, folder: Path) -> bool:
    """Whether an error is that of a file in this folder, or of the disk it is written to."""
    if not isinstance(error, OSError):
        return False
    in_folder = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
    return in_folder or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _json_object(content: bytes | None) -> dict[str, Any]:
    """Parse a JSON object; anything else is empty."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
