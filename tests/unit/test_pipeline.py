import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from distributed import rng
from distributed.config.data import Augment, GeneratedData
from distributed.data.batch import Batch, Batching, InputFormat, Shards
from distributed.data.pipeline import DataPipeline
from distributed.data.resize import resize_and_crop
from distributed.data.sources import synthetic

CPU = torch.device("cpu")
BATCHING = Batching(seed=3, global_batch_size=16, grad_accum_steps=1, evaluation_batch_size=6)


@cache
def _generated(samples: int, test_samples: int, validation_fraction: float, augment: Augment, dtype: torch.dtype):
    return DataPipeline(
        GeneratedData(
            train_samples=samples, test_samples=test_samples, validation_fraction=validation_fraction, augment=augment
        ),
        BATCHING,
        Shards.of_rank(0, 1, 1),
        InputFormat(CPU, dtype, channels_last=True),
        decoded_side=32,
    )


def pipeline(
    samples: int = 50,
    test_samples: int = 20,
    validation_fraction: float = 0.0,
    augment: Augment = Augment(),  # noqa: B008
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    shards: int = 0,
    channels_last: bool = True,
    **batching: int,
) -> DataPipeline:
    """One data set serves pipelines of any rank and batch, because generating takes a while. One shard per rank by default."""
    data = copy.copy(_generated(samples, test_samples, validation_fraction, augment, dtype))
    data.batching = replace(BATCHING, **batching)
    data.shards = Shards.of_rank(rank, world_size, shards or world_size)
    data.input_format = InputFormat(CPU, dtype, channels_last=channels_last)
    return data


def ids(step: list[Batch]) -> list[int]:
    return [number for batch in step for number in batch.sample_ids.tolist()]


TENSORS = ("images", "labels", "sample_ids", "sample_keys")


def joined(shards: list[Batch]) -> Batch:
    """Join shards into one."""
    images, *others = [torch.cat([getattr(shard, name) for shard in shards]) for name in TENSORS]
    return Batch(images, *others, shards[0].global_count, (len(images),))


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.global_count, one.shard_sizes) == (other.global_count, other.shard_sizes)
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def over_ranks(world_size: int, epoch: int, **changed: object) -> Iterator[list[list[Batch]]]:
    """Yield, per step and micro-batch, the shards of all ranks."""
    ranks = [pipeline(rank=r, world_size=world_size, **changed).train_epoch(epoch) for r in range(world_size)]
    for step in zip(*ranks, strict=True):
        yield [list(shards) for shards in zip(*step, strict=True)]


def test_every_epoch_has_every_image_once_in_another_order():
    data = pipeline()
    epochs = [[number for step in data.train_epoch(epoch) for number in ids(step)] for epoch in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] == rng.permutation(50, seed=3, epoch=0).tolist()


def test_the_last_step_has_the_remaining_images():
    data = pipeline()
    steps = list(data.train_epoch(0))
    assert data.steps_per_epoch == len(steps) == 4
    assert [len(ids(step)) for step in steps] == [16, 16, 16, 2]
    assert [step[0].global_count for step in steps] == [16, 16, 16, 2]


def test_images_labels_and_keys_match_the_ids():
    data = pipeline(augment=Augment(crop=0, flip=False))
    source = synthetic.read("generated10", 50, "train")
    pixels = source.images.transpose(0, 3, 1, 2) / 255
    mean, deviation = (getattr(pixels, name)((0, 2, 3), keepdims=True) for name in ("mean", "std"))
    (batch,) = next(data.train_epoch(0))
    numbers = batch.sample_ids.numpy()
    expected = ((pixels - mean) / deviation)[numbers]
    assert np.allclose(batch.images.numpy(), expected, atol=1e-5)
    assert batch.labels.tolist() == source.labels[numbers].tolist()
    assert torch.equal(batch.sample_keys, rng.sample_keys(batch.sample_ids, seed=3, epoch=0))
    assert batch.images.shape == (16, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
def test_images_have_the_requested_type_and_layout(dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    data = pipeline(dtype=dtype, channels_last=channels_last)
    (batch,) = next(data.train_epoch(0))
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=memory_format)
    assert next(data.evaluation("test")).images.is_contiguous(memory_format=memory_format)


def test_normalization_uses_the_training_images_only():
    data = pipeline(samples=100, validation_fraction=0.5, augment=Augment(crop=0, flip=False), global_batch_size=50)
    (batch,) = next(data.train_epoch(0))
    assert batch.images.double().mean((0, 2, 3)).abs().max() < 1e-5
    assert (batch.images.double().std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


COUNTS = (1, 2, 3, 5, 8, 11, 16, 37, 100, 256)


@pytest.fixture(params=[1, 2, 4], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalization_does_not_depend_on_a_pixels_position(dtype):
    """Vectors, their remainders and the chunks of each thread agree, for all 256 values and all channels."""
    data = pipeline(dtype=dtype)
    shades = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 32, 32, 3).contiguous()
    everywhere = data.normalizer(shades)
    table = everywhere[:, 0, 0]
    assert torch.equal(everywhere, table[:, None, None].expand_as(everywhere))
    assert torch.equal(table, torch.cat([data.normalizer(shades[n : n + 1, :1, :1])[0, 0] for n in range(256)]))
    exact = torch.arange(256)[:, None] * data.normalizer.scale.double() + data.normalizer.shift.double()
    assert (table - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    generator = torch.Generator().manual_seed(1)
    for count in COUNTS:
        images = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
        expected = torch.stack([table[images[..., channel].long(), channel] for channel in range(3)], -1)
        assert torch.equal(data.normalizer(images), expected), f"{count} images"
        assert torch.equal(data.input_format.converted(data.normalizer(images)), expected.permute(0, 3, 1, 2))


def test_cut_out_sets_a_square_to_the_mean():
    plain = next(pipeline(augment=Augment(crop=0, flip=False)).train_epoch(0))[0]
    changed = next(pipeline(augment=Augment(crop=0, flip=False, cutout=8)).train_epoch(0))[0]
    hole = (changed.images != plain.images).any(1)
    assert bool((changed.images.movedim(1, -1)[hole] == 0).all())
    assert 16 <= int(hole.flatten(1).sum(1).min()) <= int(hole.flatten(1).sum(1).max()) <= 64


@pytest.mark.parametrize("world_size", [2, 3, 5, 20])
@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_shards_of_any_world_size_form_the_same_micro_batches(world_size, grad_accum_steps):
    alone = pipeline(grad_accum_steps=grad_accum_steps).train_epoch(1)
    for expected_step, step in zip(alone, over_ranks(world_size, 1, grad_accum_steps=grad_accum_steps), strict=True):
        assert len(expected_step) == len(step)
        for micro_batch, shards in zip(expected_step, step, strict=True):
            assert_equal(joined(shards), micro_batch)
            sizes = [len(shard.labels) for shard in shards]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shards", [8, 16, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_a_shard_does_not_depend_on_its_rank(shards, world_size, grad_accum_steps):
    """Micro-batches of 2, 5, 6 and 16 images in up to 64 shards."""
    alone = pipeline(grad_accum_steps=grad_accum_steps, shards=shards).train_epoch(1)
    for expected_step, step in zip(
        alone, over_ranks(world_size, 1, grad_accum_steps=grad_accum_steps, shards=shards), strict=True
    ):
        assert len(expected_step) == len(step)
        for micro_batch, local_batches in zip(expected_step, step, strict=True):
            assert sum((local.shard_sizes for local in local_batches), ()) == micro_batch.shard_sizes
            found = [shard for local in local_batches for shard in local.shards()]
            expected = micro_batch.shards()
            assert len(found) == len(expected) == shards
            for one, other in zip(found, expected, strict=True):
                assert_equal(one, other)
            assert max(micro_batch.shard_sizes) - min(micro_batch.shard_sizes) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_an_evaluation_shard_does_not_depend_on_its_rank(world_size):
    alone = pipeline(shards=8).evaluation("test")
    ranks = [pipeline(shards=8, rank=r, world_size=world_size).evaluation("test") for r in range(world_size)]
    for batch, *local_batches in zip(alone, *ranks, strict=True):
        found = [shard for local in local_batches for shard in local.shards()]
        for one, other in zip(found, batch.shards(), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.sample_ids, other.sample_ids)


def test_the_shards_of_a_batch_form_the_batch():
    for (batch,) in pipeline(shards=8).train_epoch(0):
        shards = batch.shards()
        assert tuple(len(shard.labels) for shard in shards) == batch.shard_sizes
        assert [shard.shard_sizes for shard in shards] == [(size,) for size in batch.shard_sizes]
        for name in TENSORS:
            assert torch.equal(getattr(joined(shards), name), getattr(batch, name))
    assert batch.shard_sizes == (0, 0, 0, 1, 0, 0, 0, 1), "of two images"


def test_micro_batches_are_slices_of_the_global_batch():
    for (batch,), micro_batches in zip(
        pipeline().train_epoch(0), pipeline(grad_accum_steps=3).train_epoch(0), strict=True
    ):
        assert_equal(joined(micro_batches), batch)
    steps = list(pipeline(grad_accum_steps=3).train_epoch(0))
    assert [[len(batch.labels) for batch in step] for step in steps] == [[5, 5, 6]] * 3 + [[1, 1]]


def test_an_empty_micro_batch_is_skipped_on_all_ranks():
    *_, last = over_ranks(3, 0, grad_accum_steps=4)
    assert len(last) == 2
    assert [[len(shard.labels) for shard in shards] for shards in last] == [[0, 0, 1]] * 2


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_resumes_in_its_middle_with_the_same_batches(start):
    complete = list(pipeline(grad_accum_steps=2).train_epoch(2))[start:]
    rest = list(pipeline(grad_accum_steps=2).train_epoch(2, start_step=start))
    assert len(rest) == 4 - start
    for expected, step in zip(complete, rest, strict=True):
        for one, other in zip(expected, step, strict=True):
            assert_equal(one, other)


def test_an_epoch_resumed_at_another_world_size_is_complete():
    before = [ids(batches) for step in list(over_ranks(3, 0))[:2] for batches in step]
    after = [ids(step) for rank in range(2) for step in pipeline(rank=rank, world_size=2).train_epoch(0, start_step=2)]
    assert sorted(number for step in before + after for number in step) == list(range(50))


def test_another_seed_gives_another_order():
    assert ids(next(pipeline().train_epoch(0))) != ids(next(pipeline(seed=4).train_epoch(0)))


def test_validation_images_are_never_trained_on():
    data = pipeline(samples=100, validation_fraction=0.2)
    trained = {number for step in data.train_epoch(0) for number in ids(step)}
    held_out = {number for batch in data.evaluation("validation") for number in batch.sample_ids.tolist()}
    assert (len(trained), len(held_out)) == (80, 20)
    assert trained | held_out == set(range(100))
    assert (data.size("train"), data.size("validation"), data.size("test")) == (80, 20, 20)


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_evaluation_covers_a_split_once_over_all_ranks(world_size, split):
    settings = {"samples": 100, "validation_fraction": 0.2}
    ranks = [list(pipeline(rank=r, world_size=world_size, **settings).evaluation(split)) for r in range(world_size)]
    size = pipeline(**settings).size(split)
    assert {len(batches) for batches in ranks} == {-(-size // 6)}
    assert {batch.global_count for batches in ranks for batch in batches} == {size}
    seen = sorted(number for batches in ranks for batch in batches for number in batch.sample_ids.tolist())
    expected = [number for batch in pipeline(**settings).evaluation(split) for number in batch.sample_ids.tolist()]
    assert seen == expected == sorted(set(expected))
    assert len(seen) == size
    alone = list(pipeline(**settings).evaluation(split))
    for index, batch in enumerate(alone):
        assert torch.equal(torch.cat([batches[index].images for batches in ranks]), batch.images)
        assert torch.equal(torch.cat([batches[index].labels for batches in ranks]), batch.labels)


def test_evaluated_images_are_not_augmented():
    first, second = (list(pipeline(seed=seed).evaluation("test")) for seed in (0, 1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_an_empty_split_has_no_batches():
    assert list(pipeline().evaluation("validation")) == []


def test_the_example_is_the_same_on_every_rank():
    examples = [pipeline(rank=rank, world_size=3).example() for rank in range(3)]
    assert examples[0].images.shape == (8, 3, 32, 32)
    assert examples[0].global_count == 8
    for example in examples[1:]:
        assert_equal(example, examples[0])


def test_the_number_of_classes_comes_from_the_data_set():
    assert pipeline().num_classes == 10


def test_the_first_epochs_train_on_smaller_images():
    small, full = (pipeline(augment=Augment(**low_res)) for low_res in ({"low_res_epochs": 2, "low_res_side": 20}, {}))
    for epoch in range(3):
        (batch,), (expected,) = next(small.train_epoch(epoch)), next(full.train_epoch(epoch))
        if epoch < 2:
            images = resize_and_crop(expected.images.permute(0, 2, 3, 1), 20).permute(0, 3, 1, 2)
            expected = replace(expected, images=images)
            assert batch.images.shape == (16, 3, 20, 20)
        assert_equal(batch, expected)
    assert next(small.evaluation("test")).images.shape[2:] == (32, 32)
    assert small.example().images.shape[2:] == (32, 32)
    assert small.example(low_res=True).images.shape[2:] == (20, 20)


def test_smaller_images_do_not_depend_on_their_batch():
    augment = Augment(low_res_epochs=1, low_res_side=20)
    (entire,) = next(pipeline(augment=augment).train_epoch(0))
    parts = [next(pipeline(augment=augment, rank=rank, world_size=3).train_epoch(0)) for rank in range(3)]
    assert torch.equal(torch.cat([batch.images for (batch,) in parts]), entire.images)
