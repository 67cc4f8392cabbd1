"""Images in host memory give bit-identical batches to images on the device; normalization of pixels."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch

from distributed.config.data import Augment, GeneratedData
from distributed.data import residency
from distributed.data.batch import Batch, Batching, InputFormat, Shards
from distributed.data.normalize import channel_statistics
from distributed.data.pipeline import DataPipeline
from distributed.data.sources import synthetic

TENSORS = ("images", "labels", "sample_ids", "sample_keys")


def pipeline(device: str = "cpu", *, normalize: str = "mean_std", augment: Augment | None = None, **settings: object):
    config = GeneratedData(
        train_samples=60, test_samples=20, validation_fraction=0.2, normalize=normalize, augment=augment or Augment(),
        placement=settings.pop("placement", "auto"),
    )  # fmt: skip
    values = {"grad_accum_steps": 3, "rank": 1, "world_size": 2, "shards": 4} | settings
    return DataPipeline(
        config,
        Batching(seed=3, global_batch_size=16, grad_accum_steps=values["grad_accum_steps"], evaluation_batch_size=6),
        Shards.of_rank(values["rank"], values["world_size"], values["shards"]),
        InputFormat(torch.device(device), torch.float32, channels_last=True),
        decoded_side=32,
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.global_count, one.shard_sizes) == (other.global_count, other.shard_sizes)
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def assert_all_equal(on_host: DataPipeline, on_device: DataPipeline) -> None:
    for start in (0, 2):
        ours, theirs = (list(data.train_epoch(1, start_step=start)) for data in (on_host, on_device))
        for one, other in zip(ours, theirs, strict=True):
            for mine, expected in zip(one, other, strict=True):
                assert_equal(mine, expected)
    for split in ("train", "validation", "test"):
        for mine, expected in zip(on_host.evaluation(split), on_device.evaluation(split), strict=True):
            assert_equal(mine, expected)
    assert_equal(on_host.example(), on_device.example())


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 4, "world_size": 5, "shards": 5, "grad_accum_steps": 8}, {"grad_accum_steps": 1}]
)
def test_host_equals_device(settings):
    on_host, on_device = (pipeline(placement=place, **settings) for place in ("host", "device"))
    assert on_host._splits["train"].prefetched
    assert not on_device._splits["train"].prefetched
    assert_all_equal(on_host, on_device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_host_equals_device_on_cuda():
    on_host, on_device = (pipeline("cuda", placement=place) for place in ("host", "device"))
    assert on_host._splits["train"].images.device.type == "cpu"
    for _ in range(20):
        assert_all_equal(on_host, on_device)


def test_one_batch_is_prefetched_and_the_thread_ends():
    data = pipeline(placement="host", grad_accum_steps=1)
    requested = []

    def wanted():
        for number in range(5):
            requested.append(number)
            yield torch.tensor([number])

    gathered = data._splits["train"].gather(wanted())
    assert requested == []
    first = next(gathered)
    assert requested == [0, 1]
    assert torch.equal(first[0], data._splits["train"].images[0])
    assert any(thread.name.startswith("images") for thread in threading.enumerate())
    gathered.close()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())
    steps = data.train_epoch(0)
    list(islice(steps, 2))
    steps.close()
    del steps
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


@pytest.mark.parametrize("placement", ["device", "host"])
def test_an_explicit_placement_is_used(placement):
    assert residency.residency(placement, 1 << 60, torch.device("cpu")) == placement
    assert residency.residency(placement, 1 << 60, torch.device("cuda")) == placement


def test_auto_is_the_device_if_a_third_of_its_memory_suffices(monkeypatch):
    assert residency.residency("auto", 1 << 60, torch.device("cpu")) == "device"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3000, 10_000))
    assert residency.residency("auto", 999, torch.device("cuda")) == "device"
    assert residency.residency("auto", 1000, torch.device("cuda")) == "host"


def test_unit_only_scales_to_zero_and_one():
    data = pipeline(normalize="unit", augment=Augment(crop=0, flip=False), grad_accum_steps=1, rank=0, world_size=1)
    (batch,) = next(data.train_epoch(0))
    source = synthetic.read("generated10", 60, "train").images[batch.sample_ids.numpy()]
    expected = torch.from_numpy(source.transpose(0, 3, 1, 2).astype(np.float32)) / 255
    assert torch.allclose(batch.images, expected, rtol=2e-7, atol=0)
    assert data.metadata()["normalization"] == {"mean": [0.0] * 3, "deviation": [1.0] * 3}


def test_the_metadata_has_the_normalization_in_use():
    data = pipeline(augment=Augment(crop=0, flip=False), grad_accum_steps=1, rank=0, world_size=1)
    assert data.metadata()["classes"] == [f"class {label}" for label in range(10)]
    mean, deviation = (torch.tensor(data.metadata()["normalization"][name]) for name in ("mean", "deviation"))
    (batch,) = next(data.train_epoch(0))
    source = torch.from_numpy(synthetic.read("generated10", 60, "train").images[batch.sample_ids.numpy()])
    expected = ((source / 255 - mean) / deviation).permute(0, 3, 1, 2)
    assert torch.allclose(batch.images, expected, atol=1e-5)


@pytest.mark.parametrize("value", range(256))
def test_a_constant_channel_is_not_divided_by_zero(value):
    """Its mean, as the average of many, is not exactly value / 255."""
    mean, deviation = channel_statistics(np.full((10, 32, 32, 1), value, np.uint8))
    assert (mean.tolist(), deviation.tolist()) == ([pytest.approx(value / 255)], [1.0])
