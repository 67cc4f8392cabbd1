"""Arrays as a data set: mapped, of any size and one or three channels, and known by their fingerprints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.arrays import arrays_of, write_arrays
from numpy.typing import NDArray
from torch import Tensor

from distributed.config import load_config
from distributed.config.data import ArraysData, ImportedData
from distributed.data import residency
from distributed.data.batch import Batching, InputFormat, Shards
from distributed.data.pipeline import DataPipeline
from distributed.data.sources import arrays, identity
from distributed.data.sources.cifar import Images
from distributed.data.sources.identity import check_resumed
from distributed.data.split import validation_mask
from distributed.errors import InputError
from distributed.inference.trained_run import resize


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_arrays(tmp_path / "arrays")


def pipeline(data: ArraysData | ImportedData, *, rank: int = 0, ranks: int = 1, **format: Any) -> DataPipeline:
    own = InputFormat(torch.device("cpu"), torch.float32, channels_last=True, **format)
    return DataPipeline(data, Batching(0, 20, 1, 10), Shards.of_rank(rank, ranks, 4), own)


def data_of(root: Path, **settings: Any) -> ArraysData:
    return ArraysData.model_validate({"root": root, **settings})


def test_images_stay_mapped_and_are_read_only(root: Path) -> None:
    names, splits, _ = arrays.read(data_of(root))
    assert names == ("class 0", "class 1", "class 2")
    assert not splits["train"].images.flags.writeable
    assert splits["train"].images.shape == (60, 12, 12, 1)
    for placement in ("host", "device"):
        pixels = vars(pipeline(data_of(root, placement=placement)))["_splits"]["train"].images
        assert pixels.data_ptr() != 0
        assert f"{root}/train_images.npy" in maps_at(pixels.data_ptr())


def maps_at(address: int) -> str:
    """Return the line of this process's memory map that has the address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
        if first <= address < last:
            return line
    return ""


@pytest.mark.parametrize("placement", ["auto", "host", "device"])
def test_rows_of_a_huge_array_are_read_ahead(root: Path, placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = epoch(pipeline(data_of(root)))
    monkeypatch.setattr(arrays, "_ALL_BYTES", 1000)
    data = pipeline(data_of(root, placement=placement))
    train = vars(data)["_splits"]["train"]
    assert train.prefetched == (placement == "host")
    assert train.read_ahead
    assert torch.equal(epoch(data), expected)
    monkeypatch.setattr(residency, "_BYTES_AT_ONCE", 1000)
    assert torch.equal(residency.copied(train.images, torch.device("cpu"), train.read_ahead), train.images)


@pytest.mark.parametrize("dtype", ["<i2", ">i8", "uint64", "int8"])
def test_labels_of_any_integer_type_are_the_same_data(root: Path, dtype: str) -> None:
    before = pipeline(data_of(root)).identity()
    for split in ("train", "test"):
        np.save(root / f"{split}_labels.npy", arrays_of()[f"{split}_labels"].astype(dtype))
    assert pipeline(data_of(root)).identity() == before


def test_the_number_of_classes_can_be_set(root: Path) -> None:
    assert arrays.read(data_of(root, classes=5)).class_names[-1] == "class 4"
    found = pipeline(data_of(root, classes=5, validation_fraction=0))
    assert (found.num_classes, found.untrained_classes()) == (5, [3, 4])


@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 1), (7, 10), (9, 5, 3), (1, 1), (3, 2, 1)])
@pytest.mark.parametrize("augment", [{}, {"mixup": 0.5, "cutmix": 1.0, "cutout": 5}])
def test_any_size_and_channels_are_augmented(tmp_path: Path, shape: tuple[int, ...], augment: dict[str, Any]) -> None:
    root = write_arrays(tmp_path / "arrays", shape, classes=min(3, shape[0]) if shape[0] > 1 else 1)
    data = data_of(root, augment=augment, classes=3)
    whole = epoch(pipeline(data, resized_side=8))
    assert whole.shape[1:] == ((*shape, 1)[2], 8, 8)
    parts = [epoch(pipeline(data, resized_side=8, rank=rank, ranks=2), by_step=True) for rank in (0, 1)]
    assert torch.equal(torch.cat([batch for pair in zip(*parts, strict=True) for batch in pair]), whole)
    height, width = shape[:2]
    assert next(pipeline(data).evaluation("test")).images.shape[1:] == ((*shape, 1)[2], height, width)


def epoch(data: DataPipeline, *, by_step: bool = False) -> Any:
    batches = [micro_batch.images for step in data.train_epoch(1) for micro_batch in step]
    return batches if by_step else torch.cat(batches)


def test_built_in_networks_get_three_equal_channels(root: Path) -> None:
    images = pipeline(data_of(root), repeats_channel=True).example().images
    assert images.shape[1:] == (3, 12, 12)
    assert torch.equal(images[:, 0], images[:, 2])


def test_metadata_has_what_a_prediction_needs(tmp_path: Path) -> None:
    found = pipeline(data_of(write_arrays(tmp_path / "arrays", (9, 5)))).metadata()
    assert found["image_size"] == [9, 5]
    assert [len(found["normalization"][name]) for name in ("mean", "deviation")] == [1, 1]


def test_colour_becomes_grey_for_a_network_of_one_channel() -> None:
    colours = torch.zeros(3, 1, 4, dtype=torch.uint8)
    colours[[0, 1, 2], 0, [0, 1, 2]] = 255  # a red, a green, a blue and a white pixel
    colours[:, 0, 3] = 255
    grey: Tensor = resize(colours, (1, 4), channels=1)
    assert torch.allclose(grey.flatten() * 255, torch.tensor([76.0, 150.0, 29.0, 255.0]))
    assert resize(grey[0].mul(255).byte(), (1, 4)).shape == (1, 3, 1, 4)


def test_a_function_returns_the_same_data_as_files(own_data: None, tmp_path: Path) -> None:
    config = load_config(data={"name": "own_data:arrays", "options": {"n": 30, "channels": 3}})
    assert config.run_dir == Path("runs/improved_alexnet-arrays")
    found = arrays.read(config.data).splits
    for split, images in found.items():
        np.save(tmp_path / f"{split}_images.npy", images.images)
        np.save(tmp_path / f"{split}_labels.npy", images.labels)
    assert pipeline(data_of(tmp_path)).identity() == pipeline(config.data).identity()


def test_huge_arrays_are_identified_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_ALL_BYTES", 1000)
    monkeypatch.setattr(arrays, "_SAMPLES", 20)
    images, labels = np.zeros((40, 5, 5, 1), np.uint8), np.zeros(40, np.int64)
    before = arrays.identity(Images(images, labels))
    for place in (0, 39):
        changed = images.copy()
        changed[place, 4, 4] = 1
        assert arrays.identity(Images(changed, labels)) != before
    labels[7] = 1
    assert arrays.identity(Images(images, labels)) != before


@pytest.mark.parametrize("image_bytes", [1, 7, 8, 9, 784])
def test_every_byte_of_an_image_counts(image_bytes: int) -> None:
    images = np.arange(3 * image_bytes, dtype=np.uint64).astype(np.uint8).reshape(3, image_bytes)
    before = identity.image_hashes(images)
    for place in range(image_bytes):
        images[1, place] ^= 128
        assert list(identity.image_hashes(images) == before) == [True, False, True]
        images[1, place] ^= 128


def test_a_resume_with_other_arrays_is_refused(root: Path, tmp_path: Path) -> None:
    saved = pipeline(data_of(root)).metadata()
    images = np.load(root / "train_images.npy")
    images[5, 3, 3] ^= 1
    np.save(root / "train_images.npy", images)
    with pytest.raises(InputError, match=r"point --data\.root at the files it started with") as caught:
        check_resumed(saved, pipeline(data_of(root)).metadata() | {"data": "arrays"}, where="run")
    with pytest.raises(InputError, match="let the function return the arrays it started with"):
        check_resumed(saved, pipeline(data_of(root)).metadata() | {"data": "own_data:arrays"}, where="run")
    assert "the digest of the training images is" in caught.value.lines[0]


@pytest.mark.parametrize("labels", [np.repeat([0, 1], 2500), np.tile([0, 1], 2500)], ids=["sorted", "in turns"])
def test_arrays_in_any_order_are_normalized_by_all_classes(labels: NDArray[np.int64], tmp_path: Path) -> None:
    """Of more images than are needed for the statistics, the first, or every other one, are all of one class."""
    images = np.where(labels[:, None, None] == 0, 0, 200).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}_images.npy", images)
        np.save(tmp_path / f"{split}_labels.npy", labels)
    data = pipeline(data_of(tmp_path))
    expected = images[np.flatnonzero(~validation_mask(labels, fraction=0.2, seed=0))] / 255
    assert data.metadata()["normalization"]["mean"] == [pytest.approx(expected.mean(), abs=0.02)]
    assert set(data.raw_images(10).unique().tolist()) == {0, 200}


def test_few_images_can_be_mixed(tmp_path: Path) -> None:
    """The example that networks are tried with has no more images than there are."""
    root = write_arrays(tmp_path / "arrays", train=6)
    found = pipeline(data_of(root, validation_fraction=0.0, augment={"mixup": 0.4, "crop": 0})).example()
    assert len(found.images) == len(found.labels) == 6
