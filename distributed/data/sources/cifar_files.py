"""Finds the official CIFAR files, checks them, and reads them as bytes. Imports no torch."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources.cifar_spec import SETS, CifarSet, Form, official_name
from distributed.errors import InputError, reachable_paths
from distributed.files import opened

Bytes = NDArray[np.uint8]
PIXEL_BYTES = 3072  # per image
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class CifarFiles:
    """A data set's files in one of its forms: a folder or an archive at `path`."""

    name: str
    form: Form
    path: Path
    is_archive: bool

    @property
    def spec(self) -> CifarSet:
        return SETS[self.name]

    def check(self) -> None:
        """Raise InputError unless every file is there and has the right size, if that is known."""
        if self.is_archive:
            with self._opened(self.path) as file:
                if file.read(2) != _GZIP:
                    raise self.error(f"{self.path}: not a gzip archive")
            return
        for split in ("train", "test"):
            for file_name, records in self.spec.records(self.form, split).items():
                self._check_size(file_name, records)

    def contents(self, records: dict[str, int]) -> Iterator[tuple[str, Bytes]]:
        """Yield each file's name and bytes, after verifying its MD5 or its archive's.

        Args:
            records: number of records of each file to read.
        """
        yield from self._from_archive(set(records)) if self.is_archive else self._from_folder(records)

    def _from_folder(self, records: dict[str, int]) -> Iterator[tuple[str, Bytes]]:
        for file_name, count in records.items():
            self._check_size(file_name, count)
            # Read, not mapped: a page fault costs more than copying the page.
            content = np.fromfile(self.path / file_name, np.uint8)
            if self.form.is_python:
                digest = hashlib.md5(content.data, usedforsecurity=False).hexdigest()
                self._check_md5(self.path / file_name, digest, self.form.md5[file_name])
            yield file_name, content

    def _from_archive(self, missing: set[str]) -> Iterator[tuple[str, Bytes]]:
        """Read the files in the archive's order, without unpacking it to the disk."""
        with self._opened(self.path) as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            self._check_md5(self.path, digest, self.form.archive_md5)
            stream.seek(0)
            try:
                with tarfile.open(fileobj=stream, mode="r|gz") as archive:
                    for member in archive:
                        folder, _, file_name = member.name.rpartition("/")
                        if (
                            folder == self.form.folder
                            and file_name in missing
                            and (file := archive.extractfile(member))
                        ):
                            missing.discard(file_name)
                            yield file_name, np.frombuffer(file.read(), np.uint8)
            except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
                raise self.error(f"{self.path}: unreadable: {error}") from None
        if missing:
            raise self.damaged(min(missing), "not in the archive")

    def _opened(self, path: Path) -> BufferedReader:
        try:
            return opened(path)
        except OSError as error:
            raise InputError(f"data.name = {self.name}: {path}: {error.strerror}; {self._remedy()}") from None

    def _check_size(self, file_name: str, count: int) -> None:
        with self._opened(self.path / file_name) as file:
            size = file.seek(0, 2)
        expected = count * (self.spec.label_bytes + PIXEL_BYTES)
        if self.form.is_python:  # a pickle, which also has labels as text
            if size < count * PIXEL_BYTES:
                raise self.damaged(file_name, f"{size:,} bytes, expected at least {count * PIXEL_BYTES:,}")
        elif size != expected:
            raise self.damaged(file_name, f"{size:,} bytes, expected {expected:,}")

    def _check_md5(self, path: Path, found: str, expected: str) -> None:
        if found != expected:
            other = f", that of {official}" if (official := official_name(found)) else ""
            raise self.error(f"{path}: its MD5 is {found}{other}, expected {expected}")

    def damaged(self, file_name: str, reason: str) -> InputError:
        """Return the error for a damaged file."""
        return self.error(f"{self.path / file_name}: {reason}")

    def error(self, reason: str) -> InputError:
        """Return the error, with the remedy to get the files again."""
        again = "get the official archive again" if self.is_archive else "unpack the official archive again"
        return InputError(f"data.name = {self.name}: {reason}; {again}, or {self._remedy()}")

    def _remedy(self) -> str:
        thing = self.path.name if self.is_archive else f"{self.path.name}/"
        return (
            f"point --data.root at the folder that holds {thing}; training can also download it (--data.download) or use "
            f"--data.name generated{self.spec.classes}"
        )


def find_files(name: str, root: Path) -> CifarFiles | None:
    """Return the data set's files: the first of binary folder, Python folder, binary archive, Python archive.

    `root` is the folder that holds them, or the folder or archive itself, or a link to it.

    Raises:
        InputError: this user may not enter `root`.
    """
    with reachable_paths():  # Path.exists raises up to Python 3.13
        return next(_candidates(name, root), None)


def _candidates(name: str, root: Path) -> Iterator[CifarFiles]:
    forms = SETS[name].forms
    names = {root.name, os.path.basename(os.path.realpath(root))}
    yield from (CifarFiles(name, form, root / form.folder, False) for form in forms if (root / form.folder).is_dir())
    yield from (CifarFiles(name, form, root, False) for form in forms if form.folder in names and root.is_dir())
    yield from (CifarFiles(name, form, root / form.archive, True) for form in forms if (root / form.archive).is_file())
    yield from (CifarFiles(name, form, root, True) for form in forms if form.archive in names and root.is_file())


def files_in(name: str, root: Path) -> CifarFiles:
    """Return the data set's files; if there are none, the binary folder, whose first file will be reported missing."""
    form = SETS[name].forms[0]
    return find_files(name, root) or CifarFiles(name, form, root / form.folder, False)
