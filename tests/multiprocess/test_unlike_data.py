"""Ranks that read different data under one path, e.g. on nodes with their own disks, all refuse before the first step."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.arrays import write_arrays, write_module
from kit.cifar_files import change, small_official, write_cifar
from kit.ranks import in_group, run_ranks
from kit.small_runs import Recorder, small_config
from PIL import Image

from distributed import recipe
from distributed.build import build_data
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.data import ArraysData, CifarData, ImageFolderData, ImportedData
from distributed.data.checks import check_data
from distributed.data.sources import image_folder
from distributed.errors import InputError
from distributed.topology import Topology


def folder(root: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for place in range(3):
                Image.new("RGB", (32, 32), (40 * place, 9, 0)).save(root / split / name / f"{place}.png")


def write_cifar_10(root: Path) -> None:
    write_cifar(root, "cifar10")


def renamed_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "cow")


def reordered(root: Path) -> None:
    change(root / "cifar-10-batches-bin" / "data_batch_1.bin", lambda records: records[::-1])


def brighter(root: Path) -> None:
    images = np.load(root / "test_images.npy")
    images[3, 2, 1] ^= 16
    np.save(root / "test_images.npy", images)


def flipped(root: Path) -> None:
    def flip(records: np.ndarray) -> None:
        records[3, 99] ^= 16

    change(root / "cifar-10-batches-bin" / "test_batch.bin", flip)


def write_function(root: Path) -> None:
    for folder in root.parent.parent.iterdir():
        write_module(folder)


CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an image more": (
        "image_folder", lambda root: shutil.copy(root / "train/dog/0.png", root / "train/dog/8.png"),
        "the number of the training images is 7 on rank 1, but 6 on rank 0"),
    "a class renamed": ("image_folder", renamed_class, "the name of class 1 is cow on rank 1, but dog on rank 0"),
    "a class more": (
        "image_folder", lambda root: shutil.copytree(root / "train/dog", root / "train/eel"),
        "the number of classes is 3 on rank 1, but 2 on rank 0"),
    "another image": (
        "image_folder", lambda root: Image.new("RGB", (32, 32)).save(root / "test/dog/1.png"),
        "the digest of the test images is"),
    "a flipped bit": ("cifar10", flipped, "the digest of the test images is"),
    "another array": ("arrays", brighter, "the digest of the test images is"),
    "a label more": (
        "arrays", lambda root: np.save(root / "test_labels.npy", np.arange(16) % 4),
        "the number of classes is 4 on rank 1, but 3 on rank 0"),
    "another function": ("own_data:other_on_each_process", write_function, "the function should return the same arrays"),
    "another order": ("cifar10", reordered, "the order of the training images is"),
}  # fmt: skip


def config_of(run_dir: Path, name: str) -> TrainConfig:
    root = Path("data")
    data = {
        "cifar10": CifarData(root=root),
        "image_folder": ImageFolderData(root=root, validation_fraction=0.0),
        "arrays": ArraysData(root=root, validation_fraction=0.0),
    }.get(name) or ImportedData(name=name, validation_fraction=0.0)
    return small_config(run_dir, epochs=1, exact={"shards": 2}).model_copy(update={"data": data})


@in_group
def outcomes(root: Path) -> list[tuple[str, int]]:
    """Return, per case, the error of training and the number of steps taken."""
    found = []
    small_official(pytest.MonkeyPatch(), "cifar10")
    for case, (name, _, _) in CASES.items():
        os.chdir(root / case / str(collectives.rank()))
        sys.path.insert(0, os.getcwd())
        recorder, error = Recorder(), ""
        try:
            recipe.train(config_of(root / case / "run", name), sinks=[recorder])
        except InputError as caught:
            error = str(caught)
        found.append((error, len(recorder.steps)))
    return found


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_official(monkeypatch, "cifar10")
    for case, (name, how, _) in CASES.items():
        for rank in ("0", "1"):
            root = tmp_path / case / rank / "data"
            {"cifar10": write_cifar_10, "image_folder": folder}.get(name, write_arrays)(root)
        how(tmp_path / case / "1" / "data")
    return tmp_path


@pytest.mark.timeout(240)
def test_ranks_with_different_data_all_refuse(roots: Path) -> None:
    first, second = run_ranks(outcomes, 2, roots, timeout_seconds=180)
    assert first == second
    for (error, steps), (_, _, message) in zip(first, CASES.values(), strict=True):
        assert message in error
        assert steps == 0
    assert not [path for path in roots.glob("*/run/checkpoints/*") if path.name.startswith("step-")]


@in_group
def unreadable_on_one(root: Path) -> str:
    """Return the error that all ranks raise if a file disappears while rank 1 reads it."""
    os.chdir(root / "an image more" / "0")
    config = config_of(root / "run", "image_folder")
    data = build_data(config, Topology.from_environment(), torch.device("cpu"))
    check_data(config, data)  # no error: the same files
    if collectives.rank() == 1:
        _, listings = image_folder.list_folder(Path("data"))
        Path("data").rename("gone")
        vars(data)["_identities"] = lambda: {"train": image_folder.identity(Path("data"), listings["train"])}
    with pytest.raises(InputError) as caught:
        check_data(config, data)
    return str(caught.value)


@pytest.mark.timeout(240)
def test_a_rank_that_cannot_read_its_images_ends_all_ranks(roots: Path) -> None:
    first, second = run_ranks(unreadable_on_one, 2, roots, timeout_seconds=180)
    assert first == second
    assert "No such file or directory; the folder changed while it was read" in first
