"""Arrays that cannot be trained on, from files and from a user's function: one line each, nothing written."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kit.abuse import assert_outcome, call, untouched
from kit.arrays import arrays_of, write_arrays

SETTINGS = ("--device", "cpu", "--threads", 1, "--epochs", 1, "--data.validation_fraction", 0)


def save(name: str, array: object) -> Callable[[Path], None]:
    return lambda root: np.save(root / f"{name}.npy", np.asarray(array), allow_pickle=True)


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        file = root / f"{name}.npy"
        file.write_bytes(change(file.read_bytes()))

    return write


def no_file(root: Path) -> None:
    (root / "test_labels.npy").unlink()


def a_folder(root: Path) -> None:
    no_file(root)
    (root / "test_labels.npy").mkdir()


def a_pipe(root: Path) -> None:
    no_file(root)
    os.mkfifo(root / "test_labels.npy")


IMAGES, LABELS = arrays_of()["train_images"], arrays_of()["train_labels"]
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no file": (no_file, "test_labels.npy: No such file or directory; data.root should be a folder with train_images.npy"),
    "a folder": (a_folder, "test_labels.npy: not a regular file; write the array there with numpy.save"),
    "a pipe": (a_pipe, "test_labels.npy: not a regular file"),
    "an empty file": (content("train_images", lambda _: b""), "train_images.npy: not a .npy file with a plain array"),
    "an archive": (content("train_images", lambda _: b"PK\x03\x04" * 40), "not a .npy file with a plain array"),
    "a long header": (content("train_images", lambda old: old[:8] + b"\xff\xff" + b"(" * 65535), "not a .npy file"),
    "truncated": (content("train_images", lambda old: old[:-1]), "8,767 bytes, but its header says 8,768: truncated"),
    "a longer file": (content("test_labels", lambda old: old + b"x"), "161 bytes, but its header says 160: damaged"),
    "a negative size": (
        content("test_labels", lambda old: old.replace(b"(16,)", b"(-6,)")), "shape [-6] in its header; write it again"),
    "objects": (save("train_images", [object()]), "holds Python objects, whose pickle is not opened"),
    "records": (save("train_labels", np.zeros(60, "i4,i4")), "labels should be integers [n]"),
    "floats": (save("train_images", IMAGES / 255), "float64 [60, 12, 12]; images should be uint8 [n, h, w]"),
    "signed bytes": (save("train_images", IMAGES.astype(np.int8)), "int8 [60, 12, 12]; images should be uint8"),
    "flat images": (save("train_images", IMAGES.reshape(60, -1)), "shape [60, 144]; images should be uint8 [n, h, w]"),
    "channels first": (
        save("train_images", np.zeros((60, 3, 12, 12), np.uint8)),
        "shape [60, 3, 12, 12]; channels should come last: save images.transpose(0, 2, 3, 1)"),
    "transparency": (
        save("train_images", np.zeros((60, 12, 12, 4), np.uint8)), "with 4 channels; should have 1 (grey) or 3 (red,"),
    "no images": (save("train_images", IMAGES[:0]), "shape [0, 12, 12]: no images"),
    "no pixels": (save("train_images", IMAGES[:, :0]), "shape [60, 0, 12]: no pixels"),
    "Fortran order": (save("train_images", np.asfortranarray(IMAGES)), "in Fortran order, in which an image is not one"),
    "other images in the test": (
        save("test_images", np.zeros((16, 14, 12), np.uint8)),
        "test_images.npy: images of 14 x 12 x 1, but those of train_images are 12 x 12 x 1; give both the same shape"),
    "fewer labels": (
        save("train_labels", LABELS[:-1]), "train_labels.npy: 59 labels, but train_images has 60 images; each image needs"),
    "labels as floats": (save("train_labels", LABELS / 2), "float64 [60]; labels should be integers [n]"),
    "flags": (save("train_labels", LABELS > 1), "bool [60]; labels should be integers [n]"),
    "one-hot labels": (save("train_labels", np.eye(3, dtype=int)[LABELS]), "shape [60, 3]; labels should be integers [n]"),
    "a negative label": (save("train_labels", LABELS - 1), "label -1 of image 0; labels should be 0, 1, 2 and so on"),
    "a huge label": (save("test_labels", np.full(16, 2**63, np.uint64)), "label 9223372036854775808; labels should be less"),
    "one class": (
        lambda root: [save(f"{split}_labels", np.zeros(n, int))(root) for split, n in (("train", 60), ("test", 16))] and None,
        "all labels are 0; classification needs two classes or more"),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_arrays(tmp_path / "arrays")


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_clear_line(case: str, root: Path, tmp_path: Path) -> None:
    spoil, message = FILES[case]
    spoil(root)
    run = tmp_path / "run"
    with untouched(root):
        found = call("train", *SETTINGS, "--data.name", "arrays", "--data.root", root, "--run_dir", run)
    assert_outcome(found, message, f"error: data.name = arrays: {root}/")
    assert not run.exists()


def test_all_errors_are_reported_together(root: Path, tmp_path: Path) -> None:
    save("train_images", IMAGES.astype(float))(root)
    save("train_labels", LABELS - 1)(root)
    no_file(root)
    found = call("train", *SETTINGS, "--data.name", "arrays", "--data.root", root, "--run_dir", tmp_path / "run")
    assert_outcome(found, "float64", "label -1", "No such file", lines=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.classes", 2], "label 2, but data.classes = 2 allows 0 to 1; correct one of them"),
        (["--data.classes", 1], "data.classes = 1: should be greater than or equal to 2"),
        (["--data.classes", "ten"], "data.classes = ten: should be"),
        (["--data.side", 64], "data.side = 64: unknown setting; did you mean model.input_side?"),
        (["--data.train_samples", 9], "data.train_samples = 9: belongs to data.name = generated10 | generated100"),
        (["--data.options.n", 9], "data.options.n = 9: belongs to data.name = package.module:function"),
        (["--data.name", "array"], "data.name = array: should be one of"),
        (["--data.name", "own_data.py:arrays"], "did you mean own_data:arrays?"),
        (
            ["--evaluation.shift_tta", 12],
            "evaluation.shift_tta = 12 is too much for images of 12 x 12 pixels: set it to 11",
        ),
        (
            ["--data.augment.crop", 12, "--data.augment.crop_padding", "reflect"],
            "data.augment.crop = 12 with crop_padding = reflect is too much for images of 12 x 12 pixels: set it to 11",
        ),
        (["--model.input_side", 64], "model.input_side = 64: belongs to model.name = package.module:factory"),
    ],
)
def test_a_bad_setting_is_one_clear_line(root: Path, tmp_path: Path, settings: list[object], message: str) -> None:
    name = [] if "--data.name" in settings else ["--data.name", "arrays"]
    found = call("train", *SETTINGS, *name, "--data.root", root, *settings, "--run_dir", tmp_path / "run")
    assert_outcome(found, message, lines=2 if message.startswith("label") else 1)


FUNCTIONS: dict[str, tuple[list[object], str]] = {
    "no module": (["own_dat:arrays"], "data.name = own_dat:arrays: there is no module own_dat; did you mean own_data?"),
    "no function": (["own_data:array"], "own_data has no array; did you mean arrays?"),
    "a number": (["own_data:number"], "own_data.number is of type int; name a function or class that returns the arrays"),
    "an unknown option": (
        ["own_data:arrays", "--data.options.sides", 8],
        "the function does not accept data.options.sides; did you mean side?"),
    "a missing option": (
        ["own_data:needs_path"], "the function needs the argument path; set data.options.path"),
    "an exception": (["own_data:fails"], "the function failed: OSError: no disk at all ("),
    "nothing": (["own_data:nothing"], "the function returned None; it should return a dict of train_images, train_labels"),
    "a list": (
        ["own_data:changed", "--data.options.name", "train_images", "--data.options.how", "list"],
        "train_images: an object of type list; should be a NumPy array, e.g. numpy.asarray(...)"),
    "floats": (
        ["own_data:changed", "--data.options.name", "train_images", "--data.options.how", "float"],
        "train_images: float64 [60, 12, 12]; images should be uint8"),
    "two channels": (
        ["own_data:changed", "--data.options.name", "test_images", "--data.options.how", "channels"],
        "test_images: shape [16, 12, 12, 2] with 2 channels"),
    "fewer images": (
        ["own_data:changed", "--data.options.name", "train_images", "--data.options.how", "fewer"],
        "train_labels: 60 labels, but train_images has 59 images"),
    "text": (
        ["own_data:changed", "--data.options.name", "train_labels", "--data.options.how", "strings"],
        "train_labels: <U21 [60]; labels should be integers [n]"),
    "a negative label": (
        ["own_data:changed", "--data.options.name", "test_labels", "--data.options.how", "negative"],
        "test_labels: label -1 of image 0"),
    "a label of another kind": (
        ["own_data:changed", "--data.options.name", "test_labels", "--data.options.how", "huge"],
        "test_labels: label 1000000000002; labels should be less than 1,000,000"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_bad_function_is_one_clear_line(case: str, own_data: None, tmp_path: Path) -> None:
    arguments, message = FUNCTIONS[case]
    found = call("train", *SETTINGS, "--run_dir", tmp_path / "run", "--data.name", *arguments)
    assert_outcome(found, message, f"data.name = {arguments[0]}: ")


def test_wrong_keys_are_named(own_data: None, tmp_path: Path) -> None:
    found = call("train", *SETTINGS, "--run_dir", tmp_path / "run", "--data.name", "own_data:renamed")
    assert_outcome(found, "train_images: missing in the dict", "train_pictures: not expected in the dict", lines=2)
