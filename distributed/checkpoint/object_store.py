"""Checkpoints in an object store, or wherever else fsspec reaches by a URL. Imports no torch.

    URL/step-00000313-epoch-001/    the files of a checkpoint as they lie in a run folder
    URL/attempt.json                the attempt that may write

A checkpoint without a manifest does not exist: the manifest goes up last, and comes down first. Nothing here knows when
to do what; that is for `uploads`.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from distributed.errors import InputError
from distributed.files import digest_of_bytes
from distributed.process.deadline import call_within
from distributed.run.checkpoint_layout import FILES, MANIFEST, in_order

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


class StoreError(Exception):
    """What a store refused or did not answer: one line, with the URL and the remedy."""


class Store:
    """What lies under a URL. Every method but the first raises StoreError where the store does not do as it is asked."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _fs(self) -> Any:
        """The file system of the URL's scheme.

        Raises:
            InputError: a package for it is missing.
        """
        scheme = self.url.partition(":")[0]
        try:
            import fsspec.core  # a third of a second, and only for those who asked

            # No memory of what lay there, nor of the environment under which it was asked before.
            options = {"use_listings_cache": False, "skip_instance_cache": True}
            if scheme == "file":
                options["auto_mkdir"] = True
            return fsspec.core.url_to_fs(self.url, **options)[0]
        except ImportError as error:
            package = _PACKAGES.get(scheme, "fsspec")
            raise InputError(
                f"checkpoint.upload_to = {self.url}: {scheme}:// needs the package {package} ({error}): pip install {package}"
            ) from None
        except Exception as error:
            raise StoreError(f"{self.url}: {self._in_words(error)}") from error

    def probe(self) -> None:
        """Write, read and remove a tiny object."""
        path, content = self._path(f".probe-{uuid.uuid4().hex}"), b"probe"
        with self._asked():
            self._fs.pipe_file(path, content)
            found = self._fs.cat_file(path)
            self._fs.rm_file(path)
        if found != content:
            raise StoreError(f"{self.url}: gives back something else than was written; name another store")

    def names(self) -> list[str]:
        """All checkpoints that were ever begun there and not removed, oldest first."""
        with self._asked():
            try:
                entries = self._fs.ls(self._path(), detail=False)
            except FileNotFoundError:
                return []
        return in_order(Path(entry).name for entry in entries)

    def is_whole(self, name: str) -> bool:
        """Whether it was finished; what its files hold is not looked at."""
        return self._read(name, MANIFEST) is not None

    def has(self, checkpoint: Path) -> bool:
        """Whether this checkpoint of a run folder is there: the same manifest, and files of the sizes that it names."""
        manifest = (checkpoint / MANIFEST).read_bytes()
        if self._read(checkpoint.name, MANIFEST) != manifest:
            return False
        with self._asked():
            entries = self._fs.ls(self._path(checkpoint.name), detail=True)
        sizes = {Path(entry["name"]).name: entry["size"] for entry in entries}
        return all(sizes.get(name) == size for name, (size, _) in json.loads(manifest)["files"].items())

    def newest_state(self) -> dict[str, Any] | None:
        """The state.json of the newest checkpoint whose own is whole."""
        for name in reversed(self.names()):
            files = _object(self._read(name, MANIFEST)).get("files")
            content = self._read(name, "state.json") or b""
            expected = files.get("state.json") if isinstance(files, dict) else None
            state = _object(content)
            if expected == list(digest_of_bytes(content)) and all(
                isinstance(state.get(key), dict) for key in ("config", "bits")
            ):
                return state
        return None

    def upload(self, checkpoint: Path) -> None:
        """All files, the manifest last; what lay there of that name is no checkpoint from the first byte on."""
        name = checkpoint.name
        with self._asked():
            self._remove_file(name, MANIFEST)
            for file in (*FILES, MANIFEST):
                self._fs.put_file(str(checkpoint / file), self._path(name, file))

    def fetch(self, name: str, folder: Path) -> None:
        """Bring its files into a new folder; whether they are whole is for the caller to look at."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with self._asked():
            for file in (*FILES, MANIFEST):
                with suppress(FileNotFoundError):
                    self._fs.get_file(self._path(name, file), str(folder / file))

    def set_aside(self, name: str) -> None:
        """Let a damaged checkpoint be none: its manifest gets another name."""
        manifest = self._read(name, MANIFEST)
        with self._asked():
            self._fs.pipe_file(self._path(name, f"{MANIFEST}.damaged"), manifest or b"")
            self._remove_file(name, MANIFEST)

    def remove(self, name: str) -> None:
        """The manifest first, so that a checkpoint is never half there."""
        with self._asked():
            self._remove_file(name, MANIFEST)
            for entry in self._fs.ls(self._path(name), detail=False):
                self._remove_file(name, Path(entry).name)
            if self.url.startswith("file:"):  # elsewhere a folder is there as long as something is in it
                self._fs.rmdir(self._path(name))

    def claim(self, holder: dict[str, Any]) -> None:
        """Say which attempt may write from now on."""
        with self._asked():
            self._fs.pipe_file(self._path("attempt.json"), json.dumps(holder, indent=1).encode())

    def holder(self) -> dict[str, Any]:
        """The attempt that claimed it last; empty where none did."""
        return _object(self._read("attempt.json"))

    def _path(self, *parts: str) -> str:
        return "/".join((str(self._fs._strip_protocol(self.url)), *parts))

    def _read(self, *parts: str) -> bytes | None:
        with self._asked():
            try:
                return bytes(self._fs.cat_file(self._path(*parts)))
            except FileNotFoundError:
                return None

    def _remove_file(self, *parts: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(*parts))

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except (InputError, StoreError):
            raise
        except Exception as error:  # each store has its own kinds
            raise StoreError(f"{self.url}: {self._in_words(error)}") from error

    def _in_words(self, error: Exception) -> str:
        kind, first = type(error).__name__, next(iter(str(error).splitlines()), "")
        said = f"{kind}: {first}" if first not in ("", "None") else kind
        if self.url.startswith("file:"):
            return f"{getattr(error, 'strerror', None) or said}; fix permissions, free space, or name another folder"
        if isinstance(error, FileNotFoundError):
            return f"there is no such bucket ({said}); make it, or name another with --checkpoint.upload_to"
        if isinstance(error, PermissionError) or "credential" in kind.lower():
            return f"no right to read, write and remove there ({said}); set other credentials, as docs/storage.md says"
        return f"{said}; check the network and the store's endpoint"


def within(seconds: float, work: Callable[[], None], store: Store) -> None:
    """Run `work`, which accesses the store, with a time limit.

    Raises:
        StoreError: it took longer.
    """
    try:
        call_within(seconds, work)
    except TimeoutError:
        raise StoreError(
            f"{store.url}: no answer within {seconds:g} s; check the network and the store's endpoint"
        ) from None


def _object(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
