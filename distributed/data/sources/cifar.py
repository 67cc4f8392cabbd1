"""CIFAR-10 and CIFAR-100 from the official files. Imports numpy but not torch, so that it can check them before torch.

All forms of the files yield the same arrays. A record of the binary layout is its label bytes (CIFAR-100: coarse, fine)
and 3,072 pixel bytes, channel-major (https://www.cs.toronto.edu/~kriz/cifar.html). Pickles are read only after
their MD5 was verified. A thread hashes the images of one file while the next file is read.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources import restricted_pickle
from distributed.data.sources.cifar_checks import FileContent, wrong_coarse, wrong_counts, wrong_file
from distributed.data.sources.cifar_files import PIXEL_BYTES, Bytes, CifarFiles, files_in, find_files
from distributed.data.sources.cifar_spec import OFFICIAL_SERVER, SETS
from distributed.data.sources.identity import Hashes, Identity, identity_of, image_hashes
from distributed.errors import InputError

Labels = NDArray[np.integer[Any]]


class Images(NamedTuple):
    """Images uint8 [n, h, w, c] and labels [n], of some integer type."""

    images: Bytes
    labels: Labels


class Archive(NamedTuple):
    """An archive to download: its file name, MD5 and addresses."""

    name: str
    md5: str
    urls: tuple[str, ...]


class Identified(NamedTuple):
    """Images and fingerprint of each split that was read."""

    splits: list[Images]
    identities: dict[str, Identity]


def is_there(name: str, root: Path) -> bool:
    """Return whether `root` has the data set, as a folder or an archive with the official name."""
    return find_files(name, root) is not None


def check(name: str, root: Path) -> None:
    """Raise InputError unless every file is there and has the right size, if that is known; reading checks more."""
    files_in(name, root).check()


def read(name: str, root: Path, split: str) -> Images:
    """Return the 50,000 training or 10,000 test images.

    Raises:
        InputError: a file is missing, has the wrong size or MD5, or has content that CIFAR cannot have.
    """
    return read_splits(name, root, (split,))[0]


def read_splits(name: str, root: Path, splits: Sequence[str] = ("train", "test")) -> list[Images]:
    """Like `read`, for several splits in one pass over an archive."""
    return read_identified(name, root, splits).splits


def read_identified(name: str, root: Path, splits: Sequence[str]) -> Identified:
    """Like `read_splits`, and compute each split's fingerprint."""
    files = files_in(name, root)
    records = {split: files.spec.records(files.form, split) for split in splits}
    read = {split: _empty(sum(counts.values())) for split, counts in records.items()}
    targets: dict[str, Images] = {}  # file -> its slice of a split: an archive holds its files in any order
    for split, counts in records.items():
        for (file, count), end in zip(counts.items(), accumulate(counts.values()), strict=True):
            own = slice(end - count, end)
            targets[file] = Images(read[split].images[own], read[split].labels[own])
    contents = _read_files(files, targets)
    if wrong := wrong_file(contents):
        raise files.damaged(*wrong)
    identities: dict[str, Identity] = {}
    for split, images in read.items():
        if complaint := wrong_counts(files.spec, split, images.labels):
            raise files.error(f"{files.path}: {complaint}")
        hashes = np.concatenate([contents[file].hashes for file in records[split]])
        identities[split] = identity_of(hashes, images.labels)
    return Identified(list(read.values()), identities)


def _empty(count: int) -> Images:
    return Images(np.empty((count, 32, 32, 3), np.uint8), np.empty(count, np.uint8))


def _read_files(files: CifarFiles, targets: dict[str, Images]) -> dict[str, FileContent]:
    """Read each file into its target; return the hashes and labels of each."""
    decode = _from_pickle if files.form.is_python else _from_records
    hashing: dict[str, Future[Hashes]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="hashes") as thread:
        for file, content in files.contents({file: len(target.labels) for file, target in targets.items()}):
            target = targets[file]
            _fill(files, file, target, *decode(files, file, content, len(target.labels)))
            hashing[file] = thread.submit(image_hashes, target.images)
    return {file: FileContent(hashing[file].result(), target.labels) for file, target in targets.items()}


def archive_to_fetch(name: str, urls: Sequence[str]) -> Archive:
    """Return the archive to download: the binary one, unless `urls` end in the name of the Python one.

    Raises:
        InputError: they name both.
    """
    binary, python = SETS[name].forms
    of_python = [url for url in urls if url.partition("?")[0].endswith(python.archive)]
    if of_python and len(of_python) < len(urls):
        raise InputError(f"data.urls names {python.archive} and others: name mirrors of one archive")
    form = python if of_python else binary
    return Archive(form.archive, form.archive_md5, tuple(urls) or (OFFICIAL_SERVER + form.archive,))


def _from_records(files: CifarFiles, file: str, content: Bytes, count: int) -> tuple[Labels, Bytes]:
    """Return labels [count] and channel-major pixels uint8 [count, 3072] of a binary file."""
    label_bytes = files.spec.label_bytes
    if len(content) != (expected := count * (label_bytes + PIXEL_BYTES)):
        raise files.damaged(file, f"{len(content):,} bytes, expected {expected:,}")
    records = content.reshape(count, -1)
    if label_bytes == 2 and (complaint := wrong_coarse(records[:, 0], records[:, 1])):
        raise files.damaged(file, complaint)
    return records[:, label_bytes - 1], records[:, label_bytes:]


def _from_pickle(files: CifarFiles, file: str, content: Bytes, count: int) -> tuple[Labels, Bytes]:
    """Return labels [count] and channel-major pixels uint8 [count, 3072] of a pickle."""
    label_key = files.spec.label_key
    try:
        value = restricted_pickle.load(content.data)
        pixels, labels = value[b"data"], np.array(value[label_key])
        if not isinstance(pixels, np.ndarray) or (pixels.shape, pixels.dtype) != ((count, PIXEL_BYTES), np.uint8):
            raise ValueError(f"its data is not a uint8 array of {count:,} x {PIXEL_BYTES}")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"its {label_key.decode()} are not {count:,} numbers")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise files.damaged(file, f"not CIFAR's pickle: {error}") from None
    return labels, pixels


def _fill(files: CifarFiles, file: str, target: Images, labels: Labels, pixels: Bytes) -> None:
    """Copy channel-major pixels uint8 [n, 3072] to images [n, 32, 32, 3] in one pass."""
    lowest, highest, classes = int(labels.min()), int(labels.max()), files.spec.classes
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise files.damaged(file, f"label {wrong}, but the highest is {classes - 1}: the file is damaged")
    target.labels[:] = labels
    for channel, plane in enumerate(np.split(pixels, 3, axis=1)):
        target.images[..., channel] = plane.reshape(-1, 32, 32)
