"""CIFAR's binary files with a few random images, for tests that modify them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distributed.data.sources import cifar_spec
from distributed.data.sources.cifar_spec import COARSE_OF_FINE

Records = NDArray[np.uint8]
"""[n, label bytes + 3072]"""

PER_CLASS = {"cifar10": (10, 2), "cifar100": (2, 1)}
"""Training and test images of each class."""


def small_official(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Register the data set with the small size that `write_cifar` writes."""
    official, (train, test) = cifar_spec.SETS[name], PER_CLASS[name]
    small = replace(
        official,
        train_records=train * official.classes // len(official.forms[0].train),
        test_records=test * official.classes,
        per_class={"train": train, "test": test},
    )
    monkeypatch.setitem(cifar_spec.SETS, name, small)


def write_cifar(root: Path, name: str, seed: int = 1) -> Path:
    """Write all files of a `small_official` data set; return their folder."""
    official, drawn = cifar_spec.SETS[name], np.random.default_rng(seed)
    form = official.forms[0]
    folder = root / form.folder
    folder.mkdir(parents=True)
    for files, count in zip((form.train, (form.test,)), PER_CLASS[name], strict=True):
        labels = drawn.permutation(np.repeat(np.arange(official.classes, dtype=np.uint8), count))
        pixels = drawn.integers(0, 256, (len(labels), 3072), np.uint8)
        coarse = np.array(COARSE_OF_FINE, np.uint8)[labels][:, None] if official.label_bytes == 2 else pixels[:, :0]
        records = np.hstack([coarse, labels[:, None], pixels])
        for file, own in zip(files, np.split(records, len(files)), strict=True):
            own.tofile(folder / file)
    return folder


def records_of(file: Path) -> Records:
    label_bytes = 2 if file.parent.name.startswith("cifar-100") else 1
    return np.fromfile(file, np.uint8).reshape(-1, label_bytes + 3072)


def change(file: Path, how: Callable[[Records], Records | None]) -> None:
    """Rewrite a file with its records changed in place by `how`, or with those that it returns."""
    records = records_of(file)
    changed = how(records)
    (records if changed is None else changed).tofile(file)
