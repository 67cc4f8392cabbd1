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
    """Images uint8 [n, 32, 32, 3] and labels uint8 [n]."""

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
    """Raises InputError unless every file is there and has its size; reading looks at the labels too."""
    for split in ("train", "test"):
        for path, records in _paths(name, root, split):
            _check_size(name, path, records)


def read(name: str, root: Path, split: str) -> Images:
    """The 50,000 training or 10,000 test images.

    Raises:
        InputError: a file is missing, of another size, or holds a label out of range.
    """
    layout = _LAYOUTS[name]
    files = _paths(name, root, split)
    total = sum(count for _, count in files)
    images, labels, start = np.empty((total, 32, 32, 3), np.uint8), np.empty(total, np.uint8), 0
    for path, count in files:
        records = _records(name, path, count)
        labels[start : start + count] = records[:, layout.label_bytes - 1]
        # From the file's planes straight to where each pixel belongs.
        for channel, plane in enumerate(np.split(records[:, layout.label_bytes :], 3, axis=1)):
            images[start : start + count, :, :, channel] = plane.reshape(-1, 32, 32)
        start += count
    return Images(images, labels)


def _paths(name: str, root: Path, split: str) -> list[tuple[Path, int]]:
    layout = _LAYOUTS[name]
    return [(root / layout.folder / file, count) for file, count in layout.files(split).items()]


def _remedy(layout: _Layout) -> str:
    return f"point --data.root at the folder that holds {layout.folder}/, or train on --data.name generated{layout.classes}"


def _check_size(name: str, path: Path, count: int) -> None:
    layout = _LAYOUTS[name]
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
    except OSError as error:
        raise InputError(f"data.name = {name}: {path}: {error.strerror}; {_remedy(layout)}") from None
    expected = count * (layout.label_bytes + 3072)
    if size != expected:
        raise InputError(
            f"data.name = {name}: {path}: {size:,} bytes where {expected:,} belong; "
            f"unpack the official binary archive anew, or {_remedy(layout)}"
        )


def _records(name: str, path: Path, count: int) -> Bytes:
    """The file's records, uint8 [count, label bytes + 3072]. Read, not mapped: a page fault costs more than its copy."""
    _check_size(name, path, count)
    layout = _LAYOUTS[name]
    records = np.fromfile(path, np.uint8).reshape(count, layout.label_bytes + 3072)
    highest = int(records[:, layout.label_bytes - 1].max())
    if highest >= layout.classes:
        raise InputError(
            f"data.name = {name}: {path}: label {highest} where the highest is {layout.classes - 1}: the file is damaged; "
            f"unpack the official binary archive anew, or {_remedy(layout)}"
        )
    return records
