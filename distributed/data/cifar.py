"""CIFAR-10 and CIFAR-100 from the official binary layout. Imports numpy alone, so that it can be checked before torch.

A record is its label bytes (CIFAR-100: coarse, fine) and 3,072 pixel bytes, channel-major
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.errors import InputError

Bytes = NDArray[np.uint8]


class Images(NamedTuple):
    """Images uint8 [n, 3, 32, 32] and labels uint8 [n]."""

    images: Bytes
    labels: Bytes


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: str
    label_bytes: int
    classes: int
    records: int  # in a file of the training set

    def files(self, split: str) -> dict[str, int]:
        """File names of a split and the records that each must hold."""
        return dict.fromkeys(self.train, self.records) if split == "train" else {self.test: 10_000}


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, 10, 10_000
    ),
    "cifar100": _Layout("cifar-100-binary", ("train.bin",), "test.bin", 2, 100, 50_000),
}


def is_there(name: str, root: Path) -> bool:
    """Whether the data set's folder lies under `root`."""
    return (root / _LAYOUTS[name].folder).is_dir()


def check(name: str, root: Path) -> None:
    """Raises InputError unless every file is there, has its size, and holds labels in range."""
    for split in ("train", "test"):
        for path, records in _paths(name, root, split):
            _records(name, path, records)


def read(name: str, root: Path, split: str) -> Images:
    """The 50,000 training or 10,000 test images.

    Raises:
        InputError: a file is missing, of another size, or holds a label out of range.
    """
    layout = _LAYOUTS[name]
    records = [_records(name, path, count) for path, count in _paths(name, root, split)]
    pixels = [part[:, layout.label_bytes :].reshape(-1, 3, 32, 32) for part in records]
    return Images(np.concatenate(pixels), np.concatenate([part[:, layout.label_bytes - 1] for part in records]))


def _paths(name: str, root: Path, split: str) -> list[tuple[Path, int]]:
    layout = _LAYOUTS[name]
    return [(root / layout.folder / file, count) for file, count in layout.files(split).items()]


def _records(name: str, path: Path, count: int) -> Bytes:
    layout = _LAYOUTS[name]
    remedy = f"point --data.root at the folder that holds {layout.folder}/, or train on --data.name generated{layout.classes}"
    try:
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else None
    except OSError as error:
        raise InputError(f"data.name = {name}: {path}: {error.strerror}; {remedy}") from None
    expected = count * (layout.label_bytes + 3072)
    if data is None or size != expected:
        raise InputError(
            f"data.name = {name}: {path}: {size:,} bytes where {expected:,} belong; "
            f"unpack the official binary archive anew, or {remedy}"
        )
    records: Bytes = data.reshape(count, layout.label_bytes + 3072)
    highest = int(records[:, layout.label_bytes - 1].max())
    if highest >= layout.classes:
        raise InputError(
            f"data.name = {name}: {path}: label {highest} where the highest is {layout.classes - 1}: the file is damaged; "
            f"unpack the official binary archive anew, or {remedy}"
        )
    return records
