"""Bad data, each named: one clear line, exit code 2, and unchanged data. Small files instead of real images."""

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.abuse import assert_outcome, call, untouched
from kit.trained_runs import image_folder
from PIL import Image

BIN = "cifar-10-batches-bin"
SIZE = 30_730_000  # bytes of each official binary file of CIFAR-10
BATCHES = [f"data_batch_{place}.bin" for place in range(1, 6)]


def sparse(path: Path, size: int) -> None:
    """Write a sparse file of zeros: label 0 and black pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def cifar10(root: Path) -> Path:
    for name in [*BATCHES, "test_batch.bin"]:
        sparse(root / BIN / name, SIZE)
    return root


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Replace a file of CIFAR-10."""

    def change(root: Path) -> None:
        path = cifar10(root) / BIN / name
        path.unlink()
        make(path)

    return change


def label(name: str, value: int, at: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (cifar10(root) / BIN / name).open("r+b") as file:
            file.seek(at * 3073)
            file.write(bytes([value]))

    return change


def other_archive(root: Path) -> None:
    root.mkdir()
    (root / "notes.txt").write_text("no images")
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(root / "notes.txt")


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        root.mkdir()
        (root / name).write_bytes(content)

    return change


def python_folder(content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in [*(f"data_batch_{place}" for place in range(1, 6)), "test_batch"]:
            sparse(root / "cifar-10-batches-py" / name, 31_000_000)
            with (root / "cifar-10-batches-py" / name).open("r+b") as file:
                file.write(content)

    return change


CIFAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda root: None, "No such file"),
    "an empty folder": (lambda root: root.mkdir(), "No such file"),
    "a file for a folder": (lambda root: root.write_text("x"), "Not a directory"),
    "a circular link for a folder": (lambda root: root.symlink_to(root), "Too many levels"),
    "an empty data set": (lambda root: (root / BIN).mkdir(parents=True), "data_batch_1.bin: No such file"),
    "a file missing": (instead("data_batch_3.bin", lambda path: None), "data_batch_3.bin: No such file"),
    "the test file missing": (instead("test_batch.bin", lambda path: None), "test_batch.bin: No such file"),
    "an empty file": (instead("data_batch_2.bin", Path.touch), "0 bytes, expected 30,730,000"),
    "a truncated file": (instead("data_batch_5.bin", lambda p: sparse(p, SIZE - 1)), "30,729,999 bytes, expected 30,730,000"),
    "a file too long": (instead("test_batch.bin", lambda p: sparse(p, SIZE + 3073)), "30,733,073 bytes, expected"),
    "a folder for a file": (instead("data_batch_1.bin", Path.mkdir), "Is a directory"),
    "a pipe for a file": (instead("data_batch_1.bin", os.mkfifo), "not a regular file"),
    "a pipe for the test file": (instead("test_batch.bin", os.mkfifo), "not a regular file"),
    "the null device": (instead("data_batch_4.bin", lambda p: p.symlink_to("/dev/null")), "not a regular file"),
    "an endless device": (instead("data_batch_4.bin", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "a circular link": (instead("data_batch_4.bin", lambda path: path.symlink_to(path)), "Too many levels"),
    "a broken link": (instead("data_batch_4.bin", lambda path: path.symlink_to("gone")), "No such file"),
    "CIFAR-100 under its name": (instead("data_batch_1.bin", lambda p: sparse(p, 153_700_000)), "153,700,000 bytes"),
    "an error page for the archive": (written("cifar-10-binary.tar.gz", b"<html>404"), "not a gzip archive"),
    "an empty archive": (written("cifar-10-binary.tar.gz", b""), "not a gzip archive"),
    "a ZIP archive": (written("cifar-10-binary.tar.gz", b"PK\3\4" + b"0" * 99), "not a gzip archive"),
    "a folder for the archive": (lambda root: (root / "cifar-10-binary.tar.gz").mkdir(parents=True), "No such file"),
    "a truncated Python folder": (
        lambda root: sparse(root / "cifar-10-batches-py" / "data_batch_1", 99), "99 bytes, expected at least 30,720,000"),
}  # fmt: skip

READ: dict[str, tuple[Callable[[Path], object], str]] = {
    "a label out of range": (label("data_batch_2.bin", 10, 7), "label 10, but the highest is 9"),
    "the last label out of range": (label("test_batch.bin", 255, 9_999), "label 255, but the highest is 9"),
    "another archive": (other_archive, "expected c32a1d4ab5d03f1284b67883e8d87530"),
    "a truncated archive": (written("cifar-10-binary.tar.gz", gzip.compress(b"x" * 9999)[:30]), "its MD5 is"),
    "another Python archive": (written("cifar-10-python.tar.gz", gzip.compress(b"x")), "its MD5 is"),
    "a pickle that would run code": (python_folder(b"cos\nsystem\n(S'false'\ntR."), "its MD5 is"),
}

HUNDRED: dict[str, tuple[Callable[[Path], object], str]] = {
    "CIFAR-10 in its place": (cifar10, "cifar-100-binary/train.bin: No such file"),
    "train and test swapped": (
        lambda root: (sparse(root / "cifar-100-binary/train.bin", 30_740_000),
                      sparse(root / "cifar-100-binary/test.bin", 153_700_000)), "30,740,000 bytes, expected 153,700,000"),
    "coarse labels only": (
        lambda root: sparse(root / "cifar-100-binary/train.bin", 50_000 * 3073), "153,650,000 bytes, expected 153,700,000"),
}  # fmt: skip


def train(name: str, root: Path, run: Path) -> tuple[object, ...]:
    return (
        "--data.name",
        name,
        "--data.root",
        root,
        "--run_dir",
        run,
        "--device",
        "cpu",
        "--logging.tensorboard",
        "false",
    )


@pytest.mark.parametrize("case", CIFAR)
def test_bad_files_of_cifar_10_are_refused_untouched(case: str, tmp_path: Path) -> None:
    make, message = CIFAR[case]
    make(tmp_path / "data")
    with untouched(tmp_path):
        found = call("train", *train("cifar10", tmp_path / "data", tmp_path / "run"))
    assert_outcome(found, message, str(tmp_path / "data"), "--data.root")


@pytest.mark.parametrize("case", HUNDRED)
def test_bad_files_of_cifar_100(case: str, tmp_path: Path) -> None:
    make, message = HUNDRED[case]
    make(tmp_path / "data")
    with untouched(tmp_path):
        assert_outcome(call("train", *train("cifar100", tmp_path / "data", tmp_path / "run")), message, "--data.root")


@pytest.mark.parametrize("case", READ)
def test_damage_found_only_by_reading_is_refused(case: str, tmp_path: Path) -> None:
    make, message = READ[case]
    make(tmp_path / "data")
    with untouched(tmp_path / "data"):
        found = call("train", *train("cifar10", tmp_path / "data", tmp_path / "run"))
    assert_outcome(found, message, str(tmp_path / "data"), "again, or point --data.root")
    assert not list((tmp_path / "run").rglob("step-*"))


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no test images": (lambda root: shutil.rmtree(root / "test"), "test: No such file"),
    "empty test classes": (
        lambda root: [path.unlink() for path in (root / "test").rglob("*.png")], "test: no images; it should hold"),
    "one class": (lambda root: shutil.rmtree(root / "train/dog"), "one class folder"),
    "no classes": (lambda root: [shutil.rmtree(one) for one in (root / "test").iterdir()], "no class folders"),
    "a class only in the test split": (lambda root: (root / "test/cow").mkdir(), "this class has no folder in"),
    "an empty class": (lambda root: (root / "train/eel").mkdir(), "a class without images"),
    "a text file": (lambda root: (root / "train/cat/notes.txt").write_text(""), "not a supported image file"),
    "a folder in a class": (lambda root: (root / "train/cat/more").mkdir(), "a folder; a class folder may hold only"),
    "a pipe": (lambda root: os.mkfifo(root / "train/cat/9.png"), "not a supported image file"),
    "a broken link": (lambda root: (root / "train/cat/9.png").symlink_to("gone"), "not a supported image file"),
    "a circular link": (lambda root: (root / "train/cat/9.png").symlink_to("9.png"), "not a supported image file"),
    "a class that is a circular link": (lambda root: (root / "train/eel").symlink_to("eel"), "Too many levels"),
    "not an image": (lambda root: (root / "train/cat/0.png").write_text("not an image"), "neither PNG nor JPEG"),
    "an empty image": (lambda root: (root / "test/dog/1.png").write_bytes(b""), "1.png: empty"),
    "a truncated image": (lambda root: os.truncate(root / "train/dog/2.png", 40), "2.png: broken"),
    "a GIF": (lambda root: Image.new("L", (8, 8)).save(root / "train/dog/2.png", "GIF"), "neither PNG nor JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_bad_image_folders(case: str, tmp_path: Path) -> None:
    make, message = IMAGES[case]
    make(image_folder(tmp_path / "data"))
    arguments = train("image_folder", tmp_path / "data", tmp_path / "run")
    with untouched(tmp_path / "data"):
        found = call("train", *arguments, "--data.cache", tmp_path / "cache")
    assert_outcome(found, message, "data.name = image_folder: ")


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    arguments = train("image_folder", image_folder(tmp_path / "data"), tmp_path / "run")
    with untouched(tmp_path / "data"):
        found = call("train", *arguments, "--data.cache", tmp_path / "cache")
    assert_outcome(found, f"data.cache: cannot write to {tmp_path}/cache")
