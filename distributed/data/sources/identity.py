"""Fingerprints of a split: a digest of all records that ignores their order, and one of the order. Imports no torch.

Ranks compare fingerprints before the first step, and a resumed run compares its own with the checkpoint's. The order
matters because the validation split and each rank's shards are computed from positions in it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.errors import InputError
from distributed.host.importable import SCRIPT

Hashes = NDArray[np.uint64]
_BLOCK, _BLOCK_BYTES = 1024, 2**22  # images: few MB, which fit the cache; few calls, so that other threads get the GIL


class Identity(NamedTuple):
    """Fingerprint of a split.

    `digest` ignores the order of the records; `order` covers it, and is empty if `digest` already does.
    """

    size: int
    digest: str
    order: str = ""


def image_hashes(images: NDArray[np.uint8]) -> Hashes:
    """Return a 64-bit hash of each image of uint8 [n, ...], which may be mapped from a file larger than memory.

    The sum of 64-bit words, each times an odd key for its position, so that changing any single word changes the sum.
    """
    count, image_bytes = len(images), images[:1].nbytes
    keys = _mix(np.arange(1, -(-image_bytes // 8) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    sums = np.empty(count, np.uint64)
    at_once = max(1, min(_BLOCK, _BLOCK_BYTES // image_bytes)) if count else 1
    for start in range(0, count, at_once):
        block = _words(images[start : start + at_once])
        folded = block >> np.uint64(32)
        folded ^= block  # else changes of top bits reach only the sum's top bit, and two of them cancel
        sums[start : start + at_once] = np.einsum("ij,j->i", folded, keys)
    return _mix(sums)


def _words(images: NDArray[np.uint8]) -> Hashes:
    """Return the bytes of each image as 64-bit words, the last one filled with zeros."""
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    if padding := -rows.shape[1] % 8:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    return rows.view("<u8")


def identity_of(hashes: Hashes, labels: NDArray[np.integer[Any]]) -> Identity:
    """Return the fingerprint of images with these hashes and labels."""
    records = _mix(hashes + (labels.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1342543DE82EF95))
    total = int(_mix(records).sum(dtype=np.uint64))
    order = hashlib.blake2b(records.astype("<u8").data, digest_size=8).hexdigest()
    return Identity(len(records), f"{total:016x}", order)


def _mix(x: Hashes) -> Hashes:
    """Apply splitmix64's finalizer (https://prng.di.unimi.it/splitmix64.c): one to one, each bit depends on all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Difference(NamedTuple):
    """A difference between the metadata of two pipelines, for a message."""

    thing: str
    one: str
    other: str


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Return all differences between two pipelines' metadata; that of older checkpoints has less to compare."""
    classes = class_difference(one, other)
    found = [classes] if classes else []
    return found + [d for split in _SPLIT_NAMES if (d := image_difference(one, other, split))]


def class_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference | None:
    """Return how the classes or their order differ."""
    a, b = one.get("classes"), other.get("classes")
    if not isinstance(a, list) or not isinstance(b, list) or a == b:
        return None
    if len(a) != len(b):
        return Difference("the number of classes", f"{len(a):,}", f"{len(b):,}")
    place = next(place for place in range(len(a)) if a[place] != b[place])
    return Difference(f"the name of class {place}", str(a[place]), str(b[place]))


def image_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], split: str, *, ordered: bool = True
) -> Difference | None:
    """Return how the images of a split differ: in number, else in content, else in order."""
    x, y = _of_split(one, split), _of_split(other, split)
    for key, thing in (("size", "number"), ("digest", "digest"), *([("order", "order")] if ordered else [])):
        if key in x and key in y and x[key] != y[key]:
            return Difference(f"the {thing} of the {_SPLIT_NAMES[split]} images", _shown(x[key]), _shown(y[key]))
    return None


_SPLIT_NAMES = {"train": "training", "test": "test"}


def _of_split(metadata: Mapping[str, Any], split: str) -> dict[str, Any]:
    images = metadata.get("images")
    found = images.get(split) if isinstance(images, dict) else None
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def check_resumed(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: object) -> None:
    """Raise InputError if a run would resume with different data from what it started with.

    Args:
        saved: the content of the checkpoint's state.json.
        now: the metadata of the data as it is read now.
        where: the checkpoint, for the message.
    """
    found = [d for split in _SPLIT_NAMES if (d := image_difference(saved, now, split))]
    # The class names of other data sets are in the code, and another version may spell them differently.
    if now.get("data") == "image_folder" and (classes := class_difference(saved, now)):
        found.insert(0, classes)
    if found:
        raise InputError(
            *[f"{where}: {thing} is {new} here, but this run was started with {old}" for thing, old, new in found],
            f"a resumed run keeps its data, {now.get('data', '')}: {_how_to_keep(str(now.get('data')))}, or give another "
            "--run_dir",
        )


def _how_to_keep(name: str) -> str:
    """Say how a user gets a run's data again."""
    if name.startswith(f"{SCRIPT}:"):
        return "give train() the arrays it started with"
    if ":" in name:
        return "let the function return the arrays it started with"
    return "point --data.root at the files it started with"
