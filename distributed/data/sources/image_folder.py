"""Lists a folder of PNG and JPEG files, train/CLASS/* and test/CLASS/*, and reports all errors in it. Imports no torch.

The images are ordered by a digest of their paths: shuffled, and in the same order wherever the folder is.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources.identity import Identity
from distributed.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLITS = ("train", "test")
_SAMPLES, _SAMPLED_BYTES, _THREADS = 1000, 2**20, 8


@dataclass(frozen=True)
class Listing:
    """The files of a split, relative to the root, and their labels.

    `digest` changes if a file changes. `outline` covers names, sizes and labels, so a copy of the files has the same.
    """

    files: tuple[str, ...]
    labels: NDArray[np.integer[Any]]
    digest: str
    outline: str


class FolderListing(NamedTuple):
    """Class names, in the order of their labels, and the listing of each split."""

    class_names: tuple[str, ...]
    listings: dict[str, Listing]


class _File(NamedTuple):
    path: str  # relative to the root
    label: int
    size: int
    mtime_ns: int


def list_folder(root: Path) -> FolderListing:
    """Return the classes and the files of `train` and `test`; hidden files are ignored.

    Raises:
        InputError: all errors in the folder, one line each.
    """
    folders = {split: _class_folders(root, split) for split in SPLITS}
    labels = {name: label for label, name in enumerate(folders["train"])}
    errors = [
        f"{root / 'test' / name}: this class has no folder in {root / 'train'}; add it there, or remove it here"
        for name in folders["test"]
        if name not in labels
    ]
    found: dict[str, list[_File]] = {}
    for split in SPLITS:
        found[split] = []
        for name, folder in folders[split].items():
            if name in labels:
                files = list(_files(folder, f"{split}/{name}", labels[name], errors))
                found[split] += files
                if split == "train" and not files:
                    errors.append(
                        f"{folder}: a class without images; add some ({', '.join(SUFFIXES)}), or remove the folder"
                    )
        if not found[split] and not errors:
            errors.append(f"{root / split}: no images; it should hold CLASS/*.png, .jpg or .jpeg")
    if errors:
        raise refusal(errors)
    return FolderListing(tuple(labels), {split: _listing(found[split]) for split in SPLITS})


def refusal(errors: list[str]) -> InputError:
    """Return an InputError that lists the first 20 of a folder's errors."""
    more = [f"and {len(errors) - 20:,} more like these"] if len(errors) > 20 else []
    return InputError(*[f"data.name = image_folder: {error}" for error in [*errors[:20], *more]])


def _files(folder: Path, relative: str, label: int, errors: list[str]) -> Iterator[_File]:
    """Yield the images in a class folder; add a line to `errors` for anything else in it."""
    for entry in _visible(folder):
        if os.path.isfile(entry.path) and entry.name.lower().endswith(SUFFIXES):
            found = entry.stat()
            yield _File(f"{relative}/{entry.name}", label, found.st_size, found.st_mtime_ns)
        else:
            kind = "a folder" if os.path.isdir(entry.path) else "not a supported image file"
            errors.append(
                f"{entry.path}: {kind}; a class folder may hold only {', '.join(SUFFIXES)}: move or convert it"
            )


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _class_folders(root: Path, split: str) -> dict[str, Path]:
    """Return class name -> folder, ordered by name."""
    try:
        entries = _visible(root / split)
        others = [entry.path for entry in entries if not entry.is_dir()]
    except OSError as error:
        raise InputError(
            f"data.name = image_folder: {root / split}: {error.strerror}; point --data.root at the folder that holds "
            "train/CLASS/ and test/CLASS/ with the images"
        ) from None
    if others:
        wrong = "not a folder, nor a link to one"
        raise refusal([f"{path}: {wrong}; images belong in {split}/CLASS/: move it" for path in others])
    folders = {entry.name: Path(entry.path) for entry in entries}
    if len(folders) == 1 and split == "train":
        raise InputError(
            f"data.name = image_folder: {root / split}: only one class folder; classification needs two or more"
        )
    if not folders:
        raise InputError(f"data.name = image_folder: {root / split}: no class folders; images belong in {split}/CLASS/")
    return folders


def _listing(files: list[_File]) -> Listing:
    files = sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.path), digest_size=16).digest())
    digest, outline = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=8)
    for path, label, size, mtime_ns in files:
        digest.update(os.fsencode(f"{path}\0{label}\0{size}\0{mtime_ns}\n"))
        outline.update(os.fsencode(f"{path}\0{label}\0{size}\n"))
    labels = np.array([file.label for file in files], np.int64)
    return Listing(tuple(file.path for file in files), labels, digest.hexdigest(), outline.hexdigest())


def identity(root: Path, listing: Listing) -> Identity:
    """Return a fingerprint of the names, sizes and labels of all files, and of up to 1 MiB of each of the first 1,000.

    The first files are a random sample, because a listing is ordered by a hash.

    Raises:
        InputError: a file cannot be read.
    """

    def content(file: str) -> bytes:
        with open(root / file, "rb") as opened:
            return hashlib.blake2b(opened.read(_SAMPLED_BYTES), digest_size=8).digest()

    digest = hashlib.blake2b(listing.outline.encode(), digest_size=8)
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="hashes") as threads:  # hides the latency of network files
            for found in threads.map(content, listing.files[:_SAMPLES]):
                digest.update(found)
    except OSError as error:
        raise InputError(
            f"data.name = image_folder: {error.filename}: {error.strerror}; the folder changed while it was read: start again"
        ) from None
    return Identity(len(listing.files), digest.hexdigest())
