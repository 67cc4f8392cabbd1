"""CIFAR-10 and CIFAR-100 from the official files. Imports numpy alone, so that they can be checked before torch.

Taken is the first that lies under the root: binary folder, Python folder, binary archive, Python archive. All give the
same arrays. A record of the binary layout is its label bytes (CIFAR-100: coarse, fine) and 3,072 pixel bytes,
channel-major (https://www.cs.toronto.edu/~kriz/cifar.html). Pickles are read after their MD5 was found right. A thread
hashes the images of one file while the next is read.
"""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources import restricted_pickle
from distributed.data.sources.cifar_checks import FileContent, wrong_coarse, wrong_counts, wrong_file
from distributed.data.sources.cifar_spec import OFFICIAL_SERVER, SETS, Form, official_name
from distributed.data.sources.identity import Hashes, Identity, identity_of, image_hashes
from distributed.errors import InputError
from distributed.files import opened

Bytes = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
_GZIP = b"\x1f\x8b"


class Images(NamedTuple):
    """Images uint8 [n, side, side, 3] and labels [n], of some integer type."""

    images: Bytes
    labels: Labels


class _Place(NamedTuple):
    form: Form
    path: Path  # of a folder or of an archive
    is_archive: bool


def is_there(name: str, root: Path) -> bool:
    """Whether the data set lies under `root`, as a folder or an archive of the official names."""
    return _found(name, root) is not None


def check(name: str, root: Path) -> None:
    """Raises InputError unless every file is there and, where that is known, has its size; reading looks closer."""
    place = _place(name, root)
    if place.is_archive:
        with _opened(name, place.path) as file:
            if file.read(2) != _GZIP:
                raise InputError(f"data.name = {name}: {place.path}: no gzip archive; {_again(name, place)}")
        return
    for split in ("train", "test"):
        for file_name, records in SETS[name].records(place.form, split).items():
            _check_size(name, place, file_name, records)


def read(name: str, root: Path, split: str) -> Images:
    """The 50,000 training or 10,000 test images.

    Raises:
        InputError: a file is missing, of another size or MD5, or holds what CIFAR cannot hold.
    """
    return read_splits(name, root, (split,))[0]


def read_splits(name: str, root: Path, splits: Sequence[str] = ("train", "test")) -> list[Images]:
    """`read` of each split, looking through an archive once."""
    return read_identified(name, root, splits)[0]


def read_identified(name: str, root: Path, splits: Sequence[str]) -> tuple[list[Images], dict[str, Identity]]:
    """`read` of each split, and each split's identity."""
    cifar, place = SETS[name], _place(name, root)
    wanted = [cifar.records(place.form, split) for split in splits]
    read = [
        Images(np.empty((n, 32, 32, 3), np.uint8), np.empty(n, np.uint8)) for n in (sum(w.values()) for w in wanted)
    ]
    spots: dict[str, Images] = {}  # of each file's images in those: an archive has its files in any order
    for files, whole in zip(wanted, read, strict=True):
        for (file, count), end in zip(files.items(), accumulate(files.values()), strict=True):
            spots[file] = Images(whole.images[end - count : end], whole.labels[end - count : end])
    decode = _from_pickle if place.form.is_python else _from_records
    hashing: dict[str, Future[Hashes]] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="hashes") as thread:
        for file, content in _contents(name, place, {file: len(spot.labels) for file, spot in spots.items()}):
            _fill(name, place, file, spots[file], *decode(name, place, file, content, len(spots[file].labels)))
            hashing[file] = thread.submit(image_hashes, spots[file].images)
    contents = {file: FileContent(hashing[file].result(), spot.labels) for file, spot in spots.items()}
    if wrong := wrong_file(contents):
        raise _damaged(name, place, *wrong)
    for split, whole in zip(splits, read, strict=True):
        if complaint := wrong_counts(cifar, split, whole.labels):
            raise InputError(f"data.name = {name}: {place.path}: {complaint}; {_again(name, place)}")
    hashes = [np.concatenate([contents[file].hashes for file in files]) for files in wanted]
    return read, {s: identity_of(h, whole.labels) for s, h, whole in zip(splits, hashes, read, strict=True)}


def archive_to_fetch(name: str, urls: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
    """(file name, MD5, addresses) of the archive that stands in for missing files: the binary one, unless `urls` end in the
    other's name.

    Raises:
        InputError: they name both.
    """
    binary, python = SETS[name].forms
    of_python = [url for url in urls if url.partition("?")[0].endswith(python.archive)]
    if of_python and len(of_python) < len(urls):
        raise InputError(f"data.urls names {python.archive} and others: name mirrors of one archive")
    form = python if of_python else binary
    return form.archive, form.archive_md5, tuple(urls) or (OFFICIAL_SERVER + form.archive,)


def _found(name: str, root: Path) -> _Place | None:
    forms = SETS[name].forms
    folders = [_Place(form, root / form.folder, False) for form in forms if (root / form.folder).is_dir()]
    archives = [_Place(form, root / form.archive, True) for form in forms if (root / form.archive).is_file()]
    names = {
        root.name,
        os.path.basename(os.path.realpath(root)),
    }  # the folder or archive itself may be named, or a link to it
    folders += [_Place(form, root, False) for form in forms if form.folder in names and root.is_dir()]
    archives += [_Place(form, root, True) for form in forms if form.archive in names and root.is_file()]
    return next(iter(folders + archives), None)


def _place(name: str, root: Path) -> _Place:
    form = SETS[name].forms[0]
    return _found(name, root) or _Place(form, root / form.folder, False)  # whose absence the first file will tell


def _remedy(name: str, place: _Place) -> str:
    what = place.path.name if place.is_archive else f"{place.path.name}/"
    return (
        f"point --data.root at the folder that holds {what}, fetch it with --data.download, or train on "
        f"--data.name generated{SETS[name].classes}"
    )


def _again(name: str, place: _Place) -> str:
    what = "get the official archive" if place.is_archive else "unpack the official archive"
    return f"{what} anew, or {_remedy(name, place)}"


def _opened(name: str, path: Path, place: _Place | None = None) -> Any:
    try:
        return opened(path)
    except OSError as error:
        place = place or _Place(SETS[name].forms[0], path, True)
        raise InputError(f"data.name = {name}: {path}: {error.strerror}; {_remedy(name, place)}") from None


def _check_size(name: str, place: _Place, file_name: str, count: int) -> None:
    path = place.path / file_name
    with _opened(name, path, place) as file:
        size = file.seek(0, 2)
    expected = count * (SETS[name].label_bytes + 3072)
    if place.form.is_python:  # with the labels' text on top
        if size < count * 3072:
            raise _damaged(name, place, file_name, f"{size:,} bytes where at least {count * 3072:,} belong")
    elif size != expected:
        raise _damaged(name, place, file_name, f"{size:,} bytes where {expected:,} belong")


def _damaged(name: str, place: _Place, file_name: str, what: str) -> InputError:
    return InputError(f"data.name = {name}: {place.path / file_name}: {what}; {_again(name, place)}")


def _check_md5(name: str, place: _Place, path: Path, found: str, expected: str) -> None:
    if found != expected:
        other = f", that of {official}" if (official := official_name(found)) else ""
        raise InputError(
            f"data.name = {name}: {path}: its MD5 is {found}{other}, and {expected} belongs; {_again(name, place)}"
        )


def _contents(name: str, place: _Place, wanted: dict[str, int]) -> Iterator[tuple[str, Bytes]]:
    """Each wanted file's bytes, after its MD5 or its archive's was found right. An archive is never unpacked to the disk."""
    if not place.is_archive:
        for file, count in wanted.items():
            _check_size(name, place, file, count)
            # Read, not mapped: a page fault costs more than its copy.
            content = np.fromfile(place.path / file, np.uint8)
            if place.form.is_python:
                digest = hashlib.md5(content.data, usedforsecurity=False).hexdigest()
                _check_md5(name, place, place.path / file, digest, place.form.md5[file])
            yield file, content
        return
    with _opened(name, place.path, place) as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        _check_md5(name, place, place.path, digest, place.form.archive_md5)
        stream.seek(0)
        missing = set(wanted)
        try:
            with tarfile.open(fileobj=stream, mode="r|gz") as archive:
                for member in archive:
                    folder, _, file = member.name.rpartition("/")
                    if folder == place.form.folder and file in missing and (part := archive.extractfile(member)):
                        missing.discard(file)
                        yield file, np.frombuffer(part.read(), np.uint8)
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise InputError(f"data.name = {name}: {place.path}: unreadable: {error}; {_again(name, place)}") from None
    if missing:
        raise _damaged(name, place, min(missing), "not in the archive")


def _from_records(name: str, place: _Place, file: str, content: Bytes, count: int) -> tuple[Labels, Bytes]:
    """Labels [count] and planes uint8 [count, 3072] of a binary file."""
    cifar = SETS[name]
    if len(content) != (expected := count * (cifar.label_bytes + 3072)):
        raise _damaged(name, place, file, f"{len(content):,} bytes where {expected:,} belong")
    records = content.reshape(count, -1)
    if cifar.label_bytes == 2 and (complaint := wrong_coarse(records[:, 0], records[:, 1])):
        raise _damaged(name, place, file, complaint)
    return records[:, cifar.label_bytes - 1], records[:, cifar.label_bytes :]


def _from_pickle(name: str, place: _Place, file: str, content: Bytes, count: int) -> tuple[Labels, Bytes]:
    """The same of a pickle."""
    cifar = SETS[name]
    try:
        value = restricted_pickle.load(content.data)
        pixels, labels = value[b"data"], np.array(value[cifar.label_key])
        if not isinstance(pixels, np.ndarray) or (pixels.shape, pixels.dtype) != ((count, 3072), np.uint8):
            raise ValueError(f"its data is no uint8 array of {count:,} x 3072")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"its {cifar.label_key.decode()} are not {count:,} numbers")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(name, place, file, f"not CIFAR's pickle: {error}") from None
    return labels, pixels


def _fill(name: str, place: _Place, file: str, spot: Images, labels: Labels, planes: Bytes) -> None:
    """Channel-major planes uint8 [n, 3072] to images [n, 32, 32, 3], each pixel straight to its place."""
    lowest, highest, classes = int(labels.min()), int(labels.max()), SETS[name].classes
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise _damaged(name, place, file, f"label {wrong} where the highest is {classes - 1}: the file is damaged")
    spot.labels[:] = labels
    for channel, plane in enumerate(np.split(planes, 3, axis=1)):
        spot.images[..., channel] = plane.reshape(-1, 32, 32)
