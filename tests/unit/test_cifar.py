from pathlib import Path

import numpy as np
import pytest

from distributed.data import cifar
from distributed.errors import InputError

FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
TRAIN_FILES = {"cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)], "cifar100": ["train.bin"]}
TEST_FILES = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
LABEL_BYTES = {"cifar10": 1, "cifar100": 2}


def lay_out(root: Path, name: str) -> Path:
    """All files at their full size; sparse, so that they take no room."""
    folder = root / FOLDERS[name]
    folder.mkdir(parents=True)
    record = LABEL_BYTES[name] + 3072
    per_file = 50_000 // len(TRAIN_FILES[name])
    for file, count in [*((file, per_file) for file in TRAIN_FILES[name]), (TEST_FILES[name], 10_000)]:
        with (folder / file).open("wb") as handle:
            handle.truncate(count * record)
    return folder


def put(file: Path, at: int, *content: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        handle.write(bytes(content))


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


def complaint(name: str, root: Path) -> str:
    def look() -> None:
        cifar.check(name, root)
        cifar.read(name, root, "train")
        cifar.read(name, root, "test")

    with pytest.raises(InputError) as caught:
        look()
    (line,) = caught.value.lines
    assert f"data.name = {name}" in line
    assert "--data.root" in line
    assert f"generated{100 if name == 'cifar100' else 10}" in line
    return line


def test_a_complete_folder_passes_the_check(tmp_path, name):
    lay_out(tmp_path, name)
    cifar.check(name, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_and_channel_major_pixels_are_read_from_their_places(tmp_path, name, split):
    folder = lay_out(tmp_path, name)
    file = folder / (TEST_FILES[name] if split == "test" else TRAIN_FILES[name][-1])
    record = LABEL_BYTES[name] + 3072
    third = 2 * record + LABEL_BYTES[name]
    put(file, third - 1, 9)  # the fine label
    put(file, third + 1024 + 32 * 5 + 7, 200)  # green, row 5, column 7
    images, labels = cifar.read(name, tmp_path, split)
    count = {"train": 50_000, "test": 10_000}[split]
    assert images.shape == (count, 32, 32, 3)
    assert images.dtype == labels.dtype == np.uint8
    at = 2 + (0 if split == "test" else 50_000 - 50_000 // len(TRAIN_FILES[name]))
    assert np.argwhere(labels).tolist() == [[at]]
    assert labels[at] == 9
    assert np.argwhere(images[at]).tolist() == [[5, 7, 1]]
    assert images[at, 5, 7, 1] == 200


def test_the_coarse_label_of_cifar100_is_passed_over(tmp_path):
    put(lay_out(tmp_path, "cifar100") / "test.bin", 0, 19, 42)
    assert cifar.read("cifar100", tmp_path, "test").labels[0] == 42


def test_the_files_of_the_training_set_come_in_order(tmp_path):
    folder = lay_out(tmp_path, "cifar10")
    for index, file in enumerate(TRAIN_FILES["cifar10"]):
        put(folder / file, 0, index + 1)
    labels = cifar.read("cifar10", tmp_path, "train").labels
    assert labels[::10_000].tolist() == [1, 2, 3, 4, 5]


def test_it_is_known_whether_the_data_set_is_there(tmp_path, name):
    assert not cifar.is_there(name, tmp_path)
    lay_out(tmp_path, name)
    assert cifar.is_there(name, tmp_path)


def test_a_missing_folder_is_named_with_the_remedy(tmp_path, name):
    line = complaint(name, tmp_path)
    assert str(tmp_path / FOLDERS[name] / TRAIN_FILES[name][0]) in line
    assert "No such file or directory" in line


def test_a_missing_test_file_is_found_before_training(tmp_path, name):
    folder = lay_out(tmp_path, name)
    (folder / TEST_FILES[name]).unlink()
    assert str(folder / TEST_FILES[name]) in complaint(name, tmp_path)


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path, name, change):
    file = lay_out(tmp_path, name) / TRAIN_FILES[name][-1]
    expected = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(expected + change)
    assert f"{file}: {expected + change:,} bytes where {expected:,} belong" in complaint(name, tmp_path)


def test_an_empty_file_is_refused(tmp_path, name):
    file = lay_out(tmp_path, name) / TEST_FILES[name]
    file.write_bytes(b"")
    assert f"{file}: 0 bytes" in complaint(name, tmp_path)


def test_a_folder_in_a_files_place_is_refused(tmp_path, name):
    file = lay_out(tmp_path, name) / TEST_FILES[name]
    file.unlink()
    file.mkdir()
    assert str(file) in complaint(name, tmp_path)


def test_a_label_out_of_range_means_a_damaged_file(tmp_path, name):
    file = lay_out(tmp_path, name) / TEST_FILES[name]
    classes = 100 if name == "cifar100" else 10
    last_record = file.stat().st_size - 3072 - 1
    put(file, last_record, classes - 1)
    cifar.check(name, tmp_path)
    put(file, last_record, classes)
    line = complaint(name, tmp_path)
    assert f"{file}: label {classes} where the highest is {classes - 1}" in line
    assert "unpack" in line
