from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit.cifar_files import change, records_of, small_official, write_cifar

from distributed.data.sources import cifar, cifar_spec
from distributed.errors import InputError

FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
TRAIN_FILES = {"cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)], "cifar100": ["train.bin"]}
TEST_FILES = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for each in FOLDERS:
        small_official(monkeypatch, each)


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


def complaint(name: str, root: Path) -> str:
    def look() -> None:
        cifar.check(name, root)
        cifar.read_splits(name, root)

    with pytest.raises(InputError) as caught:
        look()
    (line,) = caught.value.lines
    assert f"data.name = {name}" in line
    assert "--data.root" in line
    assert f"generated{100 if name == 'cifar100' else 10}" in line
    return line


def test_a_complete_folder_passes_the_check(tmp_path, name):
    write_cifar(tmp_path, name)
    cifar.check(name, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_and_channel_major_pixels_are_read(tmp_path, name, split):
    folder = write_cifar(tmp_path, name)
    files = TRAIN_FILES[name] if split == "train" else [TEST_FILES[name]]
    records = np.concatenate([records_of(folder / file) for file in files])
    images, labels = cifar.read(name, tmp_path, split)
    assert images.dtype == labels.dtype == np.uint8
    assert np.array_equal(labels, records[:, -3073])  # of CIFAR-100 the fine label
    assert np.array_equal(images, records[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def test_is_there_finds_the_data_set(tmp_path, name):
    assert not cifar.is_there(name, tmp_path)
    write_cifar(tmp_path, name)
    assert cifar.is_there(name, tmp_path)


def test_a_missing_folder_is_named_with_the_remedy(tmp_path, name):
    line = complaint(name, tmp_path)
    assert str(tmp_path / FOLDERS[name] / TRAIN_FILES[name][0]) in line
    assert "No such file or directory" in line


def test_a_missing_test_file_is_found_before_training(tmp_path, name):
    folder = write_cifar(tmp_path, name)
    (folder / TEST_FILES[name]).unlink()
    assert str(folder / TEST_FILES[name]) in complaint(name, tmp_path)


@pytest.mark.parametrize("change", [-1, 1, -3073])
def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path, name, change):
    file = write_cifar(tmp_path, name) / TRAIN_FILES[name][-1]
    expected = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(expected + change)
    assert f"{file}: {expected + change:,} bytes, expected {expected:,}" in complaint(name, tmp_path)


def test_an_empty_file_is_refused(tmp_path, name):
    file = write_cifar(tmp_path, name) / TEST_FILES[name]
    file.write_bytes(b"")
    assert f"{file}: 0 bytes" in complaint(name, tmp_path)


def test_a_folder_instead_of_a_file_is_refused(tmp_path, name):
    file = write_cifar(tmp_path, name) / TEST_FILES[name]
    file.unlink()
    file.mkdir()
    assert str(file) in complaint(name, tmp_path)


def test_a_label_out_of_range_is_refused(tmp_path, name):
    file = write_cifar(tmp_path, name) / TEST_FILES[name]
    classes = 100 if name == "cifar100" else 10

    def last_label(records):
        records[-1, -3073] = classes

    change(file, last_label)
    cifar.check(name, tmp_path)
    line = complaint(name, tmp_path)
    assert f"{file}: label {classes}, but the highest is {classes - 1}" in line
    assert "unpack" in line


def label_changed(records):
    records[0, -3073] = (records[0, -3073] + 1) % 10


def black(records):
    records[3:, -3072:] = 0


IMPOSSIBLE = {
    "one image everywhere": (
        lambda records: records[:1].repeat(len(records), 0),
        "of its 20 images are in it more than once",
    ),
    "black images": (black, "17 of its 20 images are black"),
    "a label changed": (label_changed, "expected 10 of each class"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_cifar_10_content_is_refused(tmp_path, case):
    how, message = IMPOSSIBLE[case]
    change(write_cifar(tmp_path, "cifar10") / "data_batch_3.bin", how)
    assert message in complaint("cifar10", tmp_path)


@pytest.mark.parametrize("count", [20, 4])
@pytest.mark.parametrize("file", ["data_batch_4.bin", "test_batch.bin"])
def test_records_of_another_file_are_refused_in_any_order(tmp_path, file, count):
    folder = write_cifar(tmp_path, "cifar10")
    other = records_of(folder / "data_batch_2.bin")[::-1]

    def copy(records):
        records[:count] = other[:count]

    change(folder / file, copy)
    assert f"{folder / file}: {count} of its 20 images are in data_batch_2.bin too" in complaint("cifar10", tmp_path)


def swapped(records):
    records[:, :2] = records[:, 1::-1]


def coarse_of_one(records):
    records[7, 0] = (records[7, 0] + 1) % 20


@pytest.mark.parametrize(("how", "message"), [(swapped, "of its 200 records"), (coarse_of_one, "1 of its 200 records")])
def test_mismatched_label_bytes_of_cifar_100_are_refused(tmp_path, how, message):
    change(write_cifar(tmp_path, "cifar100") / "train.bin", how)
    line = complaint("cifar100", tmp_path)
    assert message in line
    assert "label bytes are swapped or damaged" in line


def test_a_smaller_set_may_have_any_number_of_each_class(tmp_path, monkeypatch):
    file = write_cifar(tmp_path, "cifar10") / "data_batch_3.bin"
    change(file, label_changed)
    official = replace(cifar_spec.SETS["cifar10"], per_class=cifar_spec.CIFAR10.per_class)
    monkeypatch.setitem(cifar_spec.SETS, "cifar10", official)
    assert len(cifar.read("cifar10", tmp_path, "train").labels) == 100
