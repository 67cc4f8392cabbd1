"""Data that is impossible, differs from the run's, or is too small: exit code 2, or one warning."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.abuse import Outcome, assert_outcome, call, untouched
from kit.cifar_files import Records, change, records_of, small_official, write_cifar
from PIL import Image

from distributed.files import digest_of

TEN, HUNDRED = "cifar-10-batches-bin", "cifar-100-binary"
SHORT = (
    "--device", "cpu", "--logging.tensorboard", "false", "--logging.level", "WARNING", "--precision", "float32",
    "--exact.shards", 1, "--evaluation.test_every_epoch", "false", "--threads", 1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cifar10", "cifar100"):
            small_official(patch, name)
        yield


def train(name: str, root: Path, run: Path, *arguments: object, epochs: int = 1) -> Outcome:
    of_data = ("--data.name", name, "--data.root", root, "--data.validation_fraction", 0)
    if name == "image_folder":
        of_data += ("--data.cache", run.parent / "cache")
    return call("train", *SHORT, *of_data, "--run_dir", run, "--epochs", epochs, "--global_batch_size", 100, *arguments)


def warned(found: Outcome) -> list[str]:
    """Return the warnings about the data, without those about generated images and torchvision."""
    lines = [line for line in found.err.splitlines() if " WARNING " in line]
    return [line for line in lines if "generated images" not in line and "py.warnings" not in line]


# Data that CIFAR cannot hold


def put(rows: Any, columns: Any, value: Any) -> Callable[[Records], None]:
    def changed(records: Records) -> None:
        records[rows, columns] = value

    return changed


def into(name: str, how: Callable[[Records], Records | None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, how)


def copy_of(source: str, to: str, how: Callable[[Records], Records] = np.copy) -> Callable[[Path], None]:
    """Replace the first records of a file by those of another."""

    def copy(folder: Path) -> None:
        taken = how(records_of(folder / source))
        change(folder / to, lambda records: np.concatenate([taken, records[len(taken) :]]))

    return copy


def next_label(row: int, column: int, labels: int) -> Callable[[Records], None]:
    def changed(records: Records) -> None:
        records[row, column] = (records[row, column] + 1) % labels

    return changed


def other_labels(records: Records) -> Records:
    return np.hstack([9 - records[:, :1], records[:, 1:]])


def dolphins_for_beavers(records: Records) -> None:
    records[records[:, 1] == 4, 1] = 30


def fine_labels_rolled(records: Records) -> None:
    records[:, 1] = np.roll(records[:, 1], 1)


ALL = slice(None)
IMPOSSIBLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a batch copied": (TEN, copy_of("data_batch_1.bin", "data_batch_2.bin"), "are in data_batch_1.bin too"),
    "a batch copied, in another order": (
        TEN, copy_of("data_batch_1.bin", "data_batch_5.bin", lambda records: records[::-1]),
        "data_batch_5.bin: 20 of its 20 images are in data_batch_1.bin too"),
    "half of a batch copied": (
        TEN, copy_of("data_batch_3.bin", "data_batch_4.bin", lambda records: records[:10]),
        "data_batch_4.bin: 10 of its 20 images are in data_batch_3.bin too"),
    "a batch copied, with other labels": (
        TEN, copy_of("data_batch_1.bin", "data_batch_2.bin", other_labels), "are in data_batch_1.bin too"),
    "a training batch as the test batch": (TEN, copy_of("data_batch_3.bin", "test_batch.bin"), "test_batch.bin: 20 of its 20"),
    "the test batch as a training batch": (TEN, copy_of("test_batch.bin", "data_batch_3.bin"), "images are in data_batch_3"),
    "all batches identical": (
        TEN, lambda folder: [shutil.copy(folder / "test_batch.bin", folder / f"data_batch_{n}.bin") for n in range(1, 6)],
        "20 of its 20 images are in"),
    "one image everywhere": (TEN, into("data_batch_2.bin", lambda records: records[:1].repeat(20, 0)), "in it more than once"),
    "grey images": (TEN, into("data_batch_1.bin", put(ALL, slice(1, None), 128)), "in it more than once"),
    "zeros for a batch": (TEN, into("data_batch_2.bin", put(ALL, ALL, 0)), "20 of its 20 images are black"),
    "zeros for the end of a batch": (
        TEN, into("data_batch_5.bin", put(slice(15, None), ALL, 0)), "data_batch_5.bin: 5 of its 20 images are black"),
    "one black image": (TEN, into("test_batch.bin", put(7, slice(1, None), 0)), "test_batch.bin: 1 of its 20"),
    "a label changed": (TEN, into("data_batch_1.bin", next_label(3, 0, 10)), "expected 10 of each class"),
    "a test label changed": (TEN, into("test_batch.bin", next_label(3, 0, 10)), "its test files hold"),
    "all labels zero": (TEN, into("data_batch_1.bin", put(ALL, 0, 0)), "of airplane, "),
    "labels from 1 to 10": (TEN, into("test_batch.bin", lambda r: np.hstack([r[:, :1] + 1, r[:, 1:]])), "label 10"),
    "records shifted by a byte": (TEN, into("data_batch_2.bin", lambda r: np.roll(r, 1)), "but the highest is 9"),
    "coarse and fine swapped": (HUNDRED, into("train.bin", lambda r: r[:, [1, 0, *range(2, 3074)]]), "label bytes"),
    "swapped in one record": (
        HUNDRED, into("test.bin", put(5, slice(0, 2), [10, 3])), "record 5: fine label 3, coarse label 10, expected 8"),
    "a coarse label changed": (HUNDRED, into("train.bin", next_label(9, 0, 20)), "1 of its 200 records"),
    "all coarse labels zero": (HUNDRED, into("test.bin", put(ALL, 0, 0)), "95 of its 100 records"),
    "fine labels in another order": (HUNDRED, into("train.bin", fine_labels_rolled), "label bytes are swapped or damaged"),
    "a fine label of the same coarse one": (HUNDRED, into("train.bin", dolphins_for_beavers), "0 of beaver, 4 of dolphin"),
    "training images in the test file": (
        HUNDRED, copy_of("train.bin", "test.bin", lambda records: records[:100]), "are in train.bin too"),
    "half of a set twice": (HUNDRED, into("train.bin", lambda r: np.concatenate([r[:100], r[:100]])), "100 of its 200"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_cifar_is_refused(case: str, tmp_path: Path) -> None:
    folder, how, message = IMPOSSIBLE[case]
    name = "cifar10" if folder == TEN else "cifar100"
    how(write_cifar(tmp_path / "data", name))
    with untouched(tmp_path / "data"):
        found = train(name, tmp_path / "data", tmp_path / "run")
    assert_outcome(found, message, str(tmp_path / "data" / folder), "again, or point --data.root")
    assert not list((tmp_path / "run").rglob("step-*"))


# Resuming on other data


@dataclass(frozen=True)
class FinishedRun:
    """A run of one epoch and the data that it was trained on."""

    name: str
    root: Path
    run: Path


def images(root: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for place in range(3):
                Image.new("RGB", (32, 32), (40 * place, 9, 99)).save(
                    root / split / name / f"{place}.png", compress_level=0
                )
    return root


def train_one_epoch(name: str, folder: Path) -> FinishedRun:
    root = folder / "data"
    _ = images(root) if name == "image_folder" else write_cifar(root, name)
    found = train(name, root, folder / "run", "--schedule.name", "constant")
    assert found.code == 0, found.err
    return FinishedRun(name, root, folder / "run")


@pytest.fixture(scope="module")
def runs(small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    return {name: train_one_epoch(name, tmp_path_factory.mktemp(name)) for name in ("image_folder", "cifar10")}


def copied(run: FinishedRun, to: Path) -> FinishedRun:
    for source, target in ((run.root, to / "data"), (run.run, to / "run")):
        shutil.copytree(source, target, symlinks=True)
    return FinishedRun(run.name, to / "data", to / "run")


def resume(run: FinishedRun, *arguments: object) -> Outcome:
    return train(run.name, run.root, run.run, "--schedule.name", "constant", *arguments, epochs=2)


def with_class(root: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(root / split / "dog", root / split / "eel")


def renamed_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "bat")


def one_pixel(path: Path) -> None:
    """Write another image with the same number of bytes and valid checksums: uncompressed."""
    before = path.stat().st_size
    with Image.open(path) as image:
        image.load()
        image.putpixel((31, 31), (1, 2, 3))
        image.save(path, compress_level=0)
    assert path.stat().st_size == before


def flip(records: Records) -> None:
    records[3, 77] ^= 4


def swap_labels(records: Records) -> None:
    other = int(np.flatnonzero(records[:, 0] != records[0, 0])[0])
    records[[0, other], 0] = records[[other, 0], 0]


NUMBER, CONTENT = "the number of the training images is", "the digest of the training images is"
OTHER: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an image renamed": ("image_folder", lambda root: (root / "train/cat/0.png").rename(root / "train/cat/9.png"), CONTENT),
    "an extra image": ("image_folder", lambda root: shutil.copy(root / "train/cat/0.png", root / "train/cat/9.png"),
                      f"{NUMBER} 7 here, but this run was started with 6"),
    "a missing image": ("image_folder", lambda root: (root / "train/cat/0.png").unlink(), f"{NUMBER} 5 here"),
    "an image in another class": (
        "image_folder", lambda root: (root / "train/cat/0.png").rename(root / "train/dog/9.png"), CONTENT),
    "a changed pixel": ("image_folder", lambda root: one_pixel(root / "train/cat/0.png"), CONTENT),
    "an extra test image": ("image_folder", lambda root: shutil.copy(root / "test/cat/0.png", root / "test/cat/9.png"),
                          "the number of the test images is 7 here"),
    "a test image changed": ("image_folder", lambda root: one_pixel(root / "test/cat/1.png"),
                             "the digest of the test images is"),
    "an extra class": ("image_folder", with_class, "the number of classes is 3 here, but this run was started with 2"),
    "a class renamed": ("image_folder", renamed_class, "the name of class 0 is bat here, but this run was started with cat"),
    "a flipped bit": ("cifar10", lambda root: change(root / TEN / "data_batch_2.bin", flip), CONTENT),
    "two labels swapped": ("cifar10", lambda root: change(root / TEN / "data_batch_2.bin", swap_labels), CONTENT),
    "a flipped bit in the test": (
        "cifar10", lambda root: change(root / TEN / "test_batch.bin", flip), "the digest of the test images is"),
    "records in another order": (
        "cifar10", lambda root: change(root / TEN / "data_batch_2.bin", lambda r: r[::-1]), "the order of the training"),
    "batches in another order": (
        "cifar10", lambda root: [(root / TEN / "data_batch_1.bin").rename(root / "x"), (root / TEN / "data_batch_2.bin").rename(
            root / TEN / "data_batch_1.bin"), (root / "x").rename(root / TEN / "data_batch_2.bin")],
        "the order of the training images is"),
    "other images": ("cifar10", lambda root: (shutil.rmtree(root), write_cifar(root, "cifar10", seed=2)), CONTENT),
}  # fmt: skip


def refused(run: FinishedRun, message: str) -> None:
    """Check that resuming fails before the first step and leaves checkpoints, metrics and data unchanged."""
    before = {file: (run.run / file).read_bytes() for file in ("metrics.jsonl", "config.toml", "digests.jsonl")}
    with untouched(run.root, run.run / "checkpoints"):
        found = resume(run)
    assert found.code == 2, found.err
    assert "Traceback" not in found.err
    assert any(message in line and str(run.run) in line for line in found.errors), found.err
    assert any("a resumed run keeps its data" in line for line in found.errors), found.err
    assert {file: (run.run / file).read_bytes() for file in before} == before


@pytest.mark.parametrize("case", OTHER)
def test_a_resume_on_other_data_is_refused(case: str, runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    name, how, message = OTHER[case]
    run = copied(runs[name], tmp_path)
    how(run.root)
    refused(run, message)


@pytest.mark.parametrize("name", ["image_folder", "cifar10"])
def test_a_run_resumes_on_a_copy_of_its_data(name: str, runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = copied(runs[name], tmp_path)
    for path in run.root.rglob("*"):
        os.utime(path, (1, 1))
    found = resume(run)
    assert found.code == 0, found.err
    assert not found.errors


SAVED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no digest, as in an older version": lambda state: state.pop("images"),
    "no order": lambda state: state["images"]["train"].pop("order"),
    "null": lambda state: state.update(images=None),
    "a list": lambda state: state.update(images=[1]),
    "a number for a split": lambda state: state["images"].update(train=3),
    "an extra split": lambda state: state["images"].update(extra={"size": 3}),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_with_less_metadata_resumes(case: str, runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = copied(runs["image_folder"], tmp_path)
    with_state(run, SAVED[case])
    found = resume(run)
    assert found.code == 0, found.err


DAMAGED: dict[str, Any] = {"a text": "x", "negative": -6, "a fraction": 6.5, "nested": {"a": [1]}}


@pytest.mark.parametrize("case", DAMAGED)
def test_an_impossible_size_of_the_data_is_refused(case: str, runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = copied(runs["image_folder"], tmp_path)
    with_state(run, lambda state: state["images"]["train"].update(size=DAMAGED[case]))
    refused(run, f"{NUMBER} 6 here")


def with_state(run: FinishedRun, how: Callable[[dict[str, Any]], object]) -> None:
    """Change the state.json of each checkpoint, and its manifest accordingly."""
    for checkpoint in (run.run / "checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        how(state)
        (checkpoint / "state.json").write_text(json.dumps(state))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"]["state.json"] = list(digest_of(checkpoint / "state.json"))
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


# Evaluating on other data

EVALUATED: dict[str, tuple[str, str, Callable[[Path], object], int, str]] = {
    "a copy": ("image_folder", "test", lambda root: None, 0, ""),
    "other test images": ("image_folder", "test", lambda root: one_pixel(root / "test/cat/1.png"), 0,
                          "the digest of the test images is"),
    "fewer test images": ("image_folder", "test", lambda root: (root / "test/cat/1.png").unlink(), 0,
                          "the number of the test images is 5 here, but was 6 in training"),
    "other training images": ("image_folder", "test", lambda root: one_pixel(root / "train/cat/1.png"), 0, ""),
    "a class renamed": ("image_folder", "test", renamed_class, 2,
                        "the name of class 0 is bat here, but was cat in training"),
    "an extra class": ("image_folder", "test", with_class, 2, "the number of classes is 3 here, but was 2 in training"),
    "a flipped bit": ("cifar10", "test", lambda root: change(root / TEN / "test_batch.bin", flip), 0,
                      "the digest of the test images is"),
    "test images in another order": (
        "cifar10", "test", lambda root: change(root / TEN / "test_batch.bin", lambda r: r[::-1]), 0, ""),
    "training images in another order": (
        "cifar10", "train", lambda root: change(root / TEN / "data_batch_2.bin", lambda r: r[::-1]), 0, ""),
    "impossible images": ("cifar10", "test", IMPOSSIBLE["a test label changed"][1], 2, "its test files hold"),
}  # fmt: skip


@pytest.mark.parametrize("case", EVALUATED)
def test_an_evaluation_on_other_data_is_reported(case: str, runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    name, split, how, code, message = EVALUATED[case]
    run = copied(runs[name], tmp_path)
    how(run.root / TEN if case == "impossible images" else run.root)
    found = call("evaluate", run.run, "--split", split, "--data.root", run.root, "--device", "cpu")
    if code:
        assert_outcome(found, message)
        return
    assert found.code == 0, found.err
    warnings = warned(found)
    assert len(warnings) == bool(message), warnings
    assert all(message in line for line in warnings)


def darken_training_images(root: Path) -> None:
    for path in root.glob("train/*/*.png"):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels // 4).save(path)


def test_an_evaluation_normalizes_as_in_training(runs: dict[str, FinishedRun], tmp_path: Path) -> None:
    run = copied(runs["image_folder"], tmp_path)
    evaluate = ("evaluate", run.run, "--split", "test", "--data.root", run.root, "--device", "cpu", "--json")
    before = call(*evaluate)
    darken_training_images(run.root)
    after = call(*evaluate)
    assert (before.code, after.code) == (0, 0), after.err
    assert json.loads(after.out)["loss"] == json.loads(before.out)["loss"]


# Splits that are too small

TINY = ("--data.train_samples", 20, "--data.test_samples", 10, "--global_batch_size", 10)
NONE = ("--data.validation_fraction", 0.2)
TOO_SMALL: dict[str, tuple[tuple[object, ...], str]] = {
    "a plateau schedule": ((*NONE, "--schedule.name", "plateau"), "and schedule.name = plateau needs some"),
    "early stopping": ((*NONE, "--early_stopping.patience", 3), "and early_stopping needs some"),
    "the best by accuracy": ((*NONE, "--checkpoint.best_by", "accuracy"), "and checkpoint.best_by = accuracy needs some"),
    "the best by loss": ((*NONE, "--checkpoint.best_by", "loss"), "and checkpoint.best_by = loss needs some"),
    "a plateau schedule and early stopping": (
        (*NONE, "--schedule.name", "plateau", "--early_stopping.patience", 3), "and early_stopping need some"),
    "a very small fraction": (
        ("--data.validation_fraction", 1e-9, "--early_stopping.patience", 3), "validation_fraction = 1e-09 holds out none"),
    "all images": (("--data.validation_fraction", 0.9), "validation_fraction = 0.9: holds out all 20 training images"),
    "all images, two of each class": (("--data.validation_fraction", 0.76), "holds out all 20 training images"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_SMALL)
def test_a_fraction_that_holds_out_none_or_all_is_refused(case: str, tmp_path: Path) -> None:
    arguments, message = TOO_SMALL[case]
    found = call("train", *SHORT, "--data.name", "generated10", *TINY, *arguments, "--run_dir", tmp_path / "run")
    assert_outcome(found, message, "data.validation_fraction = ")
    assert not list((tmp_path / "run").rglob("step-*"))


SMALL: dict[str, tuple[tuple[object, ...], str]] = {
    "no validation images": (NONE, "holds out none of the 20 training images: the classes are too small"),
    "a batch larger than the data": (
        ("--data.validation_fraction", 0, "--global_batch_size", 64), "is more than the 20 training images"),
    "more micro-batches than images": (
        ("--data.validation_fraction", 0, "--global_batch_size", 64, "--grad_accum_steps", 32), "is more than the 20"),
    "classes without an image": (("--data.validation_fraction", 0, "--data.train_samples", 10, "--data.name", "generated100"),
                                 "90 of 100 classes have no training image"),
    "a last step of one image": (("--data.validation_fraction", 0, "--data.train_samples", 11), ""),
    "more shards than images in a step": (
        ("--data.validation_fraction", 0, "--data.train_samples", 11, "--exact.shards", 8), ""),
    "evaluated one by one": (("--data.validation_fraction", 0, "--evaluation.batch_size", 1), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", SMALL)
def test_small_data_causes_at_most_one_warning(case: str, tmp_path: Path) -> None:
    arguments, message = SMALL[case]
    replaced = {**dict(zip(SHORT[::2], SHORT[1::2], strict=True)), "--data.name": "generated10", "--epochs": 1}
    replaced |= dict(zip(TINY[::2], TINY[1::2], strict=True)) | dict(zip(arguments[::2], arguments[1::2], strict=True))
    found = call("train", *(argument for pair in replaced.items() for argument in pair), "--run_dir", tmp_path / "run")
    assert found.code == 0, found.err
    warnings = warned(found)
    assert len(warnings) == bool(message), warnings
    assert all(message in line for line in warnings)


def test_a_validation_split_without_images_is_not_evaluated(tmp_path: Path) -> None:
    arguments = ("--data.name", "generated10", "--epochs", 1, *TINY, *NONE, "--run_dir", tmp_path / "run")
    assert call("train", *SHORT, *arguments).code == 0
    found = call("evaluate", tmp_path / "run", "--split", "validation", "--device", "cpu")
    assert_outcome(found, "--split validation: this split has no images; use another")


def few(counts: dict[str, int]) -> Callable[[Path], None]:
    """Create an image folder with these numbers of training images per class."""

    def make(root: Path) -> None:
        images(root)
        for name, count in counts.items():
            for place in range(count, 3):
                (root / f"train/{name}/{place}.png").unlink()

    return make


FEW: dict[str, tuple[dict[str, int], float, int, str]] = {
    "an image of each class, none held out": ({"cat": 1, "dog": 1}, 0.5, 0, "holds out none of the 2 training images"),
    "an image of each class, all held out": ({"cat": 1, "dog": 1}, 0.6, 2, "holds out all 2 training images"),
    "a class of one image": ({"cat": 1, "dog": 3}, 0.6, 0, "1 of 2 classes have no training image: cat"),
}


@pytest.mark.parametrize("case", FEW)
def test_image_folders_with_few_images(case: str, tmp_path: Path) -> None:
    counts, fraction, code, message = FEW[case]
    few(counts)(tmp_path / "data")
    arguments = ("--data.name", "image_folder", "--data.root", tmp_path / "data", "--data.cache", tmp_path / "cache",
             "--data.validation_fraction", fraction, "--run_dir", tmp_path / "run", "--epochs", 1,
             "--global_batch_size", 1)  # fmt: skip
    found = call("train", *SHORT, *arguments)
    assert found.code == code, found.err
    (line,) = [*warned(found), *found.errors]
    assert message in line
