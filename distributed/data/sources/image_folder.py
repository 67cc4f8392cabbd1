"""A folder of PNG and JPEG files, train/CLASS/* and test/CLASS/*: what is there, and what is wrong with it. No torch.

The order of the images is that of a digest of their paths: mixed, and the same wherever the folder lies.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources.identity import Identity
from distributed.errors import InputError

KINDS = (".png", ".jpg", ".jpeg")
SPLITS = ("train", "test")
_SAMPLES, _SAMPLED_BYTES, _THREADS = 1000, 2**20, 8


@dataclass(frozen=True)
class Listing:
    """The files of a split, relative to the root, with their classes; `digest` changes when a file does. `outline` covers
    names, sizes and labels, and so is the same for another copy of the files."""

    files: tuple[str, ...]
    labels: NDArray[np.integer[Any]]
    digest: str
    outline: str


def list_folder(root: Path) -> tuple[tuple[str, ...], dict[str, Listing]]:
    """Names of the classes, in order, and the files of `train` and `test`. Hidden files are passed over.

    Raises:
        InputError: all that is wrong, a line each.
    """
    folders = {split: _classes(root, split) for split in SPLITS}
    names = tuple(folders["train"])
    errors = [
        f"{root / 'test' / name}: this class has no folder in {root / 'train'}; add it there, or remove it here"
        for name in folders["test"]
        if name not in names
    ]
    found: dict[str, list[tuple[str, int, os.stat_result]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for name, folder in folders[split].items():
            if name not in names:
                continue
            for entry in _visible(folder):
                if os.path.isfile(entry.path) and entry.name.lower().endswith(KINDS):
                    found[split].append((f"{split}/{name}/{entry.name}", names.index(name), entry.stat()))
                else:
                    what = "a folder" if os.path.isdir(entry.path) else "of a kind that is not read"
                    errors.append(
                        f"{entry.path}: {what}; a class folder holds {', '.join(KINDS)} alone: move or convert it"
                    )
            if split == "train" and not any(label == names.index(name) for _, label, _ in found[split][-1:]):
                errors.append(f"{folder}: a class without images; add some ({', '.join(KINDS)}), or remove the folder")
        if not found[split] and not errors:
            errors.append(f"{root / split}: no images; it should hold CLASS/*.png, .jpg or .jpeg")
    if errors:
        raise InputError(*[f"data.name = image_folder: {error}" for error in errors])
    return names, {split: _listing(found[split]) for split in SPLITS}


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _classes(root: Path, split: str) -> dict[str, Path]:
    """Class name -> its folder, in order of names."""
    try:
        folders = {entry.name: Path(entry.path) for entry in _visible(root / split) if entry.is_dir()}
    except OSError as error:
        raise InputError(
            f"data.name = image_folder: {root / split}: {error.strerror}; point --data.root at the folder that holds "
            "train/CLASS/ and test/CLASS/ with the images"
        ) from None
    if len(folders) == 1 and split == "train":
        raise InputError(f"data.name = image_folder: {root / split}: one class folder; there is nothing to tell apart")
    if not folders:
        raise InputError(
            f"data.name = image_folder: {root / split}: no class folders; the images lie in {split}/CLASS/"
        )
    return folders


def _listing(found: list[tuple[str, int, os.stat_result]]) -> Listing:
    found = sorted(found, key=lambda one: hashlib.blake2b(os.fsencode(one[0]), digest_size=16).digest())
    digest, outline = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=8)
    for path, label, stat in found:
        digest.update(os.fsencode(f"{path}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
        outline.update(os.fsencode(f"{path}\0{label}\0{stat.st_size}\n"))
    labels = np.array([label for _, label, _ in found], np.int64)
    return Listing(tuple(path for path, _, _ in found), labels, digest.hexdigest(), outline.hexdigest())


def identity(root: Path, listing: Listing) -> Identity:
    """Covers names, sizes and labels of all files, and of the first 1,000 the content, up to a MiB each. Those are a random
    sample: the order of a listing is that of a hash.

    Raises:
        InputError: a file cannot be read.
    """

    def content(file: str) -> bytes:
        with open(root / file, "rb") as opened:
            return hashlib.blake2b(opened.read(_SAMPLED_BYTES), digest_size=8).digest()

    digest = hashlib.blake2b(listing.outline.encode(), digest_size=8)
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="hashes") as threads:  # a network's files come slowly
            for part in threads.map(content, listing.files[:_SAMPLES]):
                digest.update(part)
    except OSError as error:
        raise InputError(
            f"data.name = image_folder: {error.filename}: {error.strerror}; the folder changed while it was read: start again"
        ) from None
    return Identity(len(listing.files), digest.hexdigest())
