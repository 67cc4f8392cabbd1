"""The fingerprint of a data set: what changes it, and how ranks and resumed runs compare it."""

import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.cifar_files import change, small_official, write_cifar
from loguru import logger
from PIL import Image

from distributed.build import build_data
from distributed.config import TrainConfig
from distributed.data.checks import check_data
from distributed.data.sources import cifar, cifar_spec, image_folder, synthetic
from distributed.data.sources.identity import check_resumed, differences, identity_of, image_hashes
from distributed.errors import InputError
from distributed.topology import Topology

DRAWN = np.random.default_rng(3)
IMAGES = DRAWN.integers(0, 256, (40, 32, 32, 3), np.uint8)
LABELS = (np.arange(40) % 10).astype(np.uint8)


def of(images, labels):
    return identity_of(image_hashes(images), labels)


def test_another_order_has_the_same_digest():
    order = DRAWN.permutation(40)
    one, other = of(IMAGES, LABELS), of(IMAGES[order], LABELS[order])
    assert (one.size, one.digest) == (other.size, other.digest)
    assert one.order != other.order


def test_every_flipped_bit_of_an_image_changes_the_digest():
    flipped = IMAGES[:1].repeat(3072 * 8, 0)
    bits = np.unpackbits(flipped.reshape(3072 * 8, -1), axis=1)
    bits[np.arange(3072 * 8), np.arange(3072 * 8)] ^= 1
    hashes = image_hashes(np.packbits(bits, axis=1).reshape(flipped.shape))
    assert len(np.unique(np.append(hashes, image_hashes(IMAGES[:1])))) == 3072 * 8 + 1


def test_two_flipped_highest_bits_do_not_cancel_out():
    changed = IMAGES.copy()
    changed.reshape(40, -1)[0, [7, 15]] ^= 128
    assert of(changed, LABELS).digest != of(IMAGES, LABELS).digest


def test_exchanged_pixels_change_the_digest():
    changed = IMAGES.copy()
    changed[[0, 10], 3, 4] = changed[[10, 0], 3, 4]  # both of one class
    assert of(changed, LABELS).digest != of(IMAGES, LABELS).digest


@pytest.mark.parametrize("pair", [(0, 1), (5, 38), (0, 39)])
def test_swapped_labels_change_the_digest(pair):
    labels = LABELS.copy()
    labels[list(pair)] = labels[list(pair)[::-1]]
    assert of(IMAGES, labels).digest != of(IMAGES, LABELS).digest


def test_each_label_of_an_image_has_its_own_digest():
    assert len({of(IMAGES[:1], np.array([label])).digest for label in range(256)}) == 256


def test_dropped_and_repeated_records_change_the_digest():
    digests = {of(IMAGES, LABELS).digest}
    for place in range(40):
        rest = np.delete(np.arange(40), place)
        digests.add(of(IMAGES[rest], LABELS[rest]).digest)
        twice = np.append(np.arange(40), place)
        digests.add(of(IMAGES[twice], LABELS[twice]).digest)
        instead = np.where(np.arange(40) == place, (place + 1) % 40, np.arange(40))
        digests.add(of(IMAGES[instead], LABELS[instead]).digest)
    assert len(digests) == 121


def test_the_integer_type_of_labels_does_not_matter():
    assert of(IMAGES, LABELS.astype(np.int64)) == of(IMAGES, LABELS)


def test_hashing_makes_no_copy_of_the_images():
    images = np.zeros((8000, 32, 32, 3), np.uint8)
    tracemalloc.start()
    try:
        image_hashes(images)
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 3
    finally:
        tracemalloc.stop()


def test_the_digest_equals_the_stored_one():
    images = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 32, 32, 3)
    images[:, 0, 0, 0] = [1, 2, 3]
    assert of(images, np.array([0, 1, 2])) == (3, "126aaca9d9a4d915", "191cc561d0250f03")


@pytest.mark.skipif("CIFAR_ROOT" not in os.environ, reason="CIFAR_ROOT names no folder with CIFAR")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_data_sets_have_the_official_digests(name):
    _, found = cifar.read_identified(name, Path(os.environ["CIFAR_ROOT"]), ("train", "test"))
    assert {split: one.digest for split, one in found.items()} == cifar_spec.SETS[name].digests


def test_generated_images_differ_by_their_settings():
    made = {synthetic.identity(*arguments) for arguments in (("generated10", 50, "train"), ("generated100", 50, "train"),
            ("generated10", 60, "train"), ("generated10", 50, "test"))}  # fmt: skip
    assert len({one.digest for one in made}) == 4


# Image folders


def folder(root: Path) -> Path:
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for place in range(count):
                shade = (40 * place, 100 * (name == "dog"), 0)
                Image.new("RGB", (8, 8), shade).save(root / split / name / f"{place}.png")
    return root


def identities(root: Path):
    _, listings = image_folder.list_folder(root)
    return {split: image_folder.identity(root, listing) for split, listing in listings.items()}


def test_a_copy_of_an_image_folder_has_the_same_identity(tmp_path):
    before = identities(folder(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b/train/cat/0.png", (1, 1))
    assert identities(tmp_path / "b") == before


def last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FOLDER_CHANGES = {
    "renamed": lambda root: (root / "train/cat/0.png").rename(root / "train/cat/9.png"),
    "moved to another class": lambda root: (root / "train/cat/3.png").rename(root / "train/dog/9.png"),
    "a suffix": lambda root: (root / "train/cat/0.png").rename(root / "train/cat/0.PNG"),
    "removed": lambda root: (root / "train/cat/0.png").unlink(),
    "added": lambda root: shutil.copy(root / "train/cat/0.png", root / "train/cat/9.png"),
    "a byte": lambda root: last_byte(root / "train/dog/1.png"),
    "a longer file": lambda root: (root / "train/dog/1.png").open("ab").write(b"x"),
    "two exchanged": lambda root: [(root / "train/cat/0.png").rename(root / "x"), (root / "train/cat/1.png").rename(
        root / "train/cat/0.png"), (root / "x").rename(root / "train/cat/1.png")],
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDER_CHANGES)
def test_a_changed_image_folder_has_another_identity(tmp_path, case):
    before = identities(folder(tmp_path / "a"))
    FOLDER_CHANGES[case](tmp_path / "a")
    after = identities(tmp_path / "a")
    assert after["train"].digest != before["train"].digest
    assert after["test"] == before["test"]


def test_a_thousand_files_of_a_large_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "_SAMPLES", 3)
    root = folder(tmp_path / "a")
    before = identities(root)["train"].digest
    changed = 0
    for file in image_folder.list_folder(root).listings["train"].files:
        last_byte(root / file)
        changed += identities(root)["train"].digest != before
        last_byte(root / file)
    assert changed == 3


# Differences

METADATA = {
    "classes": ["cat", "dog"],
    "images": {"train": {"size": 5000, "digest": "aa", "order": "01"}, "test": {"size": 10, "digest": "bb"}},
}


def other_train(**train: object):
    return METADATA | {"images": METADATA["images"] | {"train": METADATA["images"]["train"] | train}}


DIFFERENT = {
    "classes": (METADATA | {"classes": ["cat", "dog", "eel"]}, ("the number of classes", "2", "3")),
    "a name": (METADATA | {"classes": ["cat", "cow"]}, ("the name of class 1", "dog", "cow")),
    "the order of the names": (METADATA | {"classes": ["dog", "cat"]}, ("the name of class 0", "cat", "dog")),
    "images": (other_train(size=6000, digest="cc"), ("the number of the training images", "5,000", "6,000")),
    "content": (other_train(digest="cc", order="02"), ("the digest of the training images", "aa", "cc")),
    "order": (other_train(order="02"), ("the order of the training images", "01", "02")),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_most_informative_difference_is_named(case):
    metadata, difference = DIFFERENT[case]
    assert differences(METADATA, metadata) == [difference]
    with pytest.raises(InputError, match=f"{difference[0]} is {difference[2]} here, but this run was started with"):
        check_resumed(METADATA, metadata | {"data": "image_folder"}, where="runs/a")


@pytest.mark.parametrize("saved", [{}, {"classes": ["cat", "dog"]}, {"images": None}, {"images": {"train": 3}},
                                   {"images": []}, {"classes": "cat"}, {"images": {"train": {}}}])  # fmt: skip
def test_older_checkpoints_with_less_metadata_resume(saved):
    assert differences(saved, METADATA) == []
    check_resumed(saved, METADATA, where="runs/a")


def test_another_spelling_of_cifars_classes_is_accepted():
    check_resumed(METADATA, DIFFERENT["a name"][0] | {"data": "cifar10"}, where="runs/a")


# Warnings and unusable splits


def warnings(data: dict[str, object], **settings: object) -> list[str]:
    """Return the warnings of `check_data` about this data."""
    values = {"model": {"name": "improved_alexnet"}, "device": "cpu", "global_batch_size": 4, "exact": {"shards": 1}}
    config = TrainConfig.model_validate(values | {"data": {"validation_fraction": 0.0} | data} | settings)
    text: list[str] = []
    handle = logger.add(lambda message: text.append(message.record["message"]), level="WARNING")
    try:
        check_data(config, build_data(config, Topology(), torch.device("cpu")))
    finally:
        logger.remove(handle)
    return text


def small_cifar(monkeypatch: pytest.MonkeyPatch, root: Path, name: str) -> dict[str, object]:
    """Return the data section of a small CIFAR whose digests are registered as official."""
    small_official(monkeypatch, name)
    write_cifar(root, name)
    _, found = cifar.read_identified(name, root, ("train", "test"))
    digests = {split: one.digest for split, one in found.items()}
    monkeypatch.setitem(cifar_spec.SETS, name, replace(cifar_spec.SETS[name], digests=digests))
    return {"name": name, "root": root}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_official_data_set_causes_no_warning(tmp_path, monkeypatch, name):
    assert warnings(small_cifar(monkeypatch, tmp_path, name)) == []


def flip(records):
    records[2, -1] ^= 1


def swap_labels(records):
    other = int(np.flatnonzero(records[:, 0] != records[0, 0])[0])
    records[[0, other], 0] = records[[other, 0], 0]


@pytest.mark.parametrize("how", [flip, swap_labels])
@pytest.mark.parametrize(("file", "split"), [("data_batch_2.bin", "train"), ("test_batch.bin", "test")])
def test_changed_records_of_cifar_are_one_warning(tmp_path, monkeypatch, how, file, split):
    data = small_cifar(monkeypatch, tmp_path, "cifar10")
    change(tmp_path / "cifar-10-batches-bin" / file, how)
    (line,) = warnings(data)
    assert line.startswith(f"data.name = cifar10: not the official data set (digest of the {split} images ")


def test_records_in_another_order_count_as_official(tmp_path, monkeypatch):
    data = small_cifar(monkeypatch, tmp_path, "cifar10")
    change(tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin", lambda records: records[::-1])
    assert warnings(data) == []


TINY = {"name": "generated10", "train_samples": 20, "test_samples": 10, "validation_fraction": 0.2}


def test_a_fraction_that_holds_out_nothing_is_a_warning():
    (line,) = warnings(TINY)
    assert line.startswith("data.validation_fraction = 0.2 holds out none of the 20 training images")


@pytest.mark.parametrize(
    ("settings", "needed_by"),
    [
        ({"schedule": {"name": "plateau"}}, "schedule.name = plateau needs"),
        ({"early_stopping": {"patience": 2}}, "early_stopping needs"),
        ({"checkpoint": {"best_by": "loss"}}, "checkpoint.best_by = loss needs"),
        ({"schedule": {"name": "plateau"}, "early_stopping": {}}, "schedule.name = plateau and early_stopping need"),
    ],
)
def test_a_fraction_that_holds_out_nothing_is_refused_if_needed(settings, needed_by):
    with pytest.raises(InputError, match=f"holds out none of the 20 training images, and {needed_by}"):
        warnings(TINY, **settings)


def test_a_fraction_that_holds_out_all_images_is_refused():
    with pytest.raises(InputError, match=r"validation_fraction = 0\.9: holds out all 20 training images"):
        warnings(TINY | {"validation_fraction": 0.9})


def test_classes_without_a_training_image_are_named():
    (line,) = warnings(TINY | {"train_samples": 12, "validation_fraction": 0.6}, global_batch_size=2)
    assert line.startswith(
        "8 of 10 classes have no training image: class 2, class 3, class 4, class 5, class 6 and 3 more"
    )


def test_a_batch_larger_than_the_data_is_a_warning():
    (line,) = warnings(TINY | {"validation_fraction": 0.0}, global_batch_size=21)
    assert line.startswith("global_batch_size = 21 is more than the 20 training images")


def test_large_enough_splits_cause_no_warning():
    assert warnings(TINY | {"validation_fraction": 0.5}, schedule={"name": "plateau"}) == []
