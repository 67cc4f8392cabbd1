"""Data sets of four NumPy arrays, mapped from files or returned by a user's function. Imports no torch.

The files are never unpickled. Their headers and labels are checked before anything else is read.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from distributed.config.data import ArraysData, ImportedData
from distributed.config.user_code import UserFunction, type_name
from distributed.data.sources.array_checks import NAMES, SPLITS, Complaint, Outline, check_labels, check_outlines
from distributed.data.sources.cifar import Images
from distributed.data.sources.identity import Identity, identity_of, image_hashes
from distributed.data.sources.mapped import Mapped, ReadAhead, map_rows
from distributed.errors import InputError

GivenArrays = Mapping[str, NDArray[Any]]
"""The arrays of `NAMES`, images uint8 [n, h, w] or [n, h, w, c] and integer labels [n], by name."""

_ALL_BYTES = 2**30  # of images: seconds to read from a slow disk; of more only a sample is read
_SAMPLES = 1000


class _Header(NamedTuple):
    """The header of a .npy file; `start` is the offset of the array in bytes."""

    outline: Outline
    start: int


class Arrays(NamedTuple):
    """Class names, the images uint8 [n, h, w, c] with their labels of each split, and of mapped ones what reads ahead."""

    class_names: tuple[str, ...]
    splits: dict[str, Images]
    read_ahead: dict[str, ReadAhead]


def check(config: ArraysData) -> None:
    """Check headers, file sizes and labels, without reading images.

    Raises:
        InputError: all errors, one line each.
    """
    _checked_labels(config)


def read(config: ArraysData | ImportedData, given: GivenArrays | None = None) -> Arrays:
    """Return the arrays; those of files are mapped, read-only.

    Args:
        given: the arrays that Python code gave instead of a function.

    Raises:
        InputError: files are missing, damaged or of other types and shapes; or the function fails or returns others.
    """
    if isinstance(config, ImportedData):
        splits = _checked(config, given, "given to train()") if given is not None else _returned(config)
        read_ahead = {}
    else:
        labels = _checked_labels(config)
        mapped = {split: _mapped(_file(config, f"{split}_images")) for split in SPLITS}
        splits = {split: Images(_with_channels(mapped[split].array), labels[f"{split}_labels"]) for split in SPLITS}
        read_ahead = {split: found for split in SPLITS if (found := mapped[split].read_ahead)}
    count = config.classes or 1 + max(int(images.labels.max()) for images in splits.values())
    return Arrays(tuple(f"class {label}" for label in range(count)), splits, read_ahead)


def _mapped(file: Path) -> Mapped:
    (dtype, shape), start = _header(file)
    return map_rows(file, start, dtype, shape, as_rows=int(np.prod(shape, dtype=np.int64)) > _ALL_BYTES)


def identity(source: Images, read_ahead: ReadAhead | None = None) -> Identity:
    """Return the fingerprint of a split: of all images up to 1 GiB, else of all labels and 1,000 images."""
    images, labels = source
    if images.nbytes <= _ALL_BYTES:
        return identity_of(image_hashes(images), labels)
    ids = np.unique(np.linspace(0, len(images) - 1, _SAMPLES).astype(np.int64))
    digest = hashlib.blake2b(repr(images.shape).encode(), digest_size=8)
    digest.update(labels.astype("<i8").data)
    for start in range(0, len(ids), 16):
        own = ids[start : start + 16]
        if read_ahead:
            read_ahead(own)
        digest.update(image_hashes(images[own]).astype("<u8").data)
    return Identity(len(images), digest.hexdigest())


def _file(config: ArraysData, name: str) -> Path:
    return config.root / f"{name}.npy"


def _checked_labels(config: ArraysData) -> dict[str, NDArray[Any]]:
    """Return the labels of both splits by array name, after all checks of the files."""
    found: list[Complaint] = []
    outlines: dict[str, Outline] = {}
    for name in NAMES:
        try:
            outlines[name] = _header(_file(config, name)).outline
        except OSError as error:
            needed = ", ".join(f"{each}.npy" for each in NAMES)
            found.append(Complaint(name, f"{error.strerror}; data.root should be a folder with {needed}"))
        except ValueError as error:
            found.append(Complaint(name, str(error)))
    found += check_outlines(outlines)
    wrong = {name for name, _ in found}
    labels = {
        name: np.load(_file(config, name), allow_pickle=False)
        for name in outlines
        if name.endswith("labels") and name not in wrong
    }
    found += check_labels(labels, config.classes)
    if found:
        raise InputError(*[f"data.name = arrays: {_file(config, name)}: {reason}" for name, reason in found])
    return labels


def _header(file: Path) -> _Header:
    """Read the header of a .npy file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, holds objects, or is shorter or longer than its header says.
    """
    size = os.stat(file).st_size
    if not file.is_file():  # opening a pipe would block
        raise ValueError("not a regular file; write the array there with numpy.save")
    with open(file, "rb") as opened:
        try:
            version = npy.read_magic(opened)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, is_fortran, dtype = read_header(opened)
        except Exception:  # of the many parsers beneath
            raise ValueError("not a .npy file with a plain array; write it with numpy.save") from None
        start = opened.tell()
    if dtype.hasobject:
        raise ValueError("holds Python objects, whose pickle is not opened; save an array of numbers")
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {list(shape)} in its header; write it again with numpy.save")
    expected = start + dtype.itemsize * int(np.prod([int(length) for length in shape], dtype=object))
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise ValueError(f"{size:,} bytes, but its header says {expected:,}: {state}; copy it again")
    if is_fortran and len(shape) > 1:
        raise ValueError("in Fortran order, in which an image is not one piece; save numpy.ascontiguousarray(images)")
    return _Header(Outline(dtype, shape), start)


def _returned(config: ImportedData) -> dict[str, Images]:
    """Call the user's function; return its arrays by split, after all checks."""
    function = UserFunction(
        setting="data.name", path=config.name, noun="function", result="the arrays", options=config.options,
        options_in="data.options",
    )  # fmt: skip
    found = function.call(function.load())
    if not isinstance(found, Mapping):
        raise function.error(f"the function returned {type_name(found)}; it should return a dict of {', '.join(NAMES)}")
    return _checked(config, found, "that the function returned")


def _checked(config: ImportedData, found: GivenArrays, origin: str) -> dict[str, Images]:
    """Return the arrays of a dict by split, contiguous, after all checks."""
    complaints = [Complaint(name, f"missing in the dict {origin}") for name in NAMES if name not in found]
    complaints += [
        Complaint(str(name), f"not expected in the dict {origin}, only {', '.join(NAMES)}")
        for name in found
        if name not in NAMES
    ]
    arrays = {name: found[name] for name in NAMES if name in found}
    complaints += [
        Complaint(name, f"{type_name(array)}; should be a NumPy array, e.g. numpy.asarray(...)")
        for name, array in arrays.items()
        if not isinstance(array, np.ndarray)
    ]
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    complaints += check_outlines({name: Outline(array.dtype, array.shape) for name, array in arrays.items()})
    wrong = {name for name, _ in complaints}
    labels = {name: array for name, array in arrays.items() if name.endswith("labels") and name not in wrong}
    complaints += check_labels(labels, config.classes)
    if complaints:
        raise InputError(*[f"data.name = {config.name}: {name}: {reason}" for name, reason in complaints])
    return {
        split: Images(
            _with_channels(np.ascontiguousarray(arrays[f"{split}_images"])),
            np.ascontiguousarray(arrays[f"{split}_labels"]),
        )
        for split in SPLITS
    }


def _with_channels(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images[..., np.newaxis] if images.ndim == 3 else images
