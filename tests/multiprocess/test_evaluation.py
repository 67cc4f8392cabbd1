"""Evaluation counts every image once, however unevenly the images are sharded, and all ranks have the totals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from kit.ranks import in_group, once, run_ranks
from kit.small_runs import small_config
from torch import nn

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.data.pipeline import DataPipeline
from distributed.engine.protocol import Engine
from distributed.topology import Topology
from distributed.training.losses import CROSS_ENTROPY
from distributed.training.steps import evaluate
from distributed.training.totals import Totals
from distributed.training.views import Views

CPU = torch.device("cpu")
TEST, TRAIN, VALIDATION = 23, 60, 20


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of one split in batches of one size on one rank.

    `images` and `shards` have an entry per batch. `modes` holds the values of `training` that the layers had during the
    evaluation, and the model's afterwards.
    """

    totals: Totals
    images: list[int]
    shards: list[tuple[int, ...]]
    ids: list[int]
    modes: tuple[set[bool], bool]


Key = tuple[int, str, str, int]
"""Shards (0 for fast mode), precision, split, batch size."""


@in_group
def evaluate_splits(keys: list[Key]) -> dict[Key, Evaluated]:
    found = {}
    topology = Topology(collectives.rank(), collectives.world_size())
    for shards, precision in dict.fromkeys(key[:2] for key in keys):
        config = small_config(
            Path("unused"),
            exact={"shards": shards},
            precision=precision,
            data={"train_samples": TRAIN + VALIDATION, "test_samples": TEST, "validation_fraction": 0.25},
        )
        data = build_data(config, topology, CPU)
        engine = build_engine(config, topology, data, CPU)
        for key in keys:
            if key[:2] == (shards, precision):
                data.batching = replace(data.batching, evaluation_batch_size=key[3])
                found[key] = evaluate_split(engine, data, key[2])
    return found


def evaluate_split(engine: Engine, data: DataPipeline, split: str) -> Evaluated:
    seen = set[bool]()
    hooks = [
        module.register_forward_pre_hook(lambda layer, _: seen.add(layer.training))
        for module in engine.model.modules()
        if isinstance(module, nn.Linear)
    ]
    totals = evaluate(engine, data, split, loss=CROSS_ENTROPY, views=Views(), device=CPU)
    for hook in hooks:
        hook.remove()
    batches = list(data.evaluation(split))
    return Evaluated(
        totals,
        [len(batch.labels) for batch in batches],
        [batch.shard_sizes for batch in batches],
        [int(sample) for batch in batches for sample in batch.sample_ids],
        (seen, engine.model.training),
    )


# With 9 the last batch is uneven; with 2 one of three ranks has no images; 1000 is more than a split has.
SIZES = [9, 2, 1000]


SPLITS = {"validation": VALIDATION, "test": TEST}
FAST: list[Key] = [(0, "float64", split, size) for split in SPLITS for size in SIZES]
EXACT: list[Key] = [(8, "float64", split, size) for split in SPLITS for size in SIZES]
EXACT += [(8, precision, "test", 9) for precision in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def evaluated() -> Callable[[int], list[dict[Key, Evaluated]]]:
    return once(lambda world_size: run_ranks(evaluate_splits, world_size, FAST + EXACT))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("key", FAST + EXACT, ids=str)
def test_three_ranks_have_the_totals_of_one(evaluated, key: Key) -> None:
    alone, count = evaluated(1)[0][key].totals, SPLITS[key[2]]
    assert alone.count == count
    assert 0 < alone.correct5 < count
    for rank in evaluated(3):
        totals = rank[key].totals
        assert (totals.count, totals.correct, totals.correct5) == (count, alone.correct, alone.correct5)
        assert totals.mean_loss == pytest.approx(alone.mean_loss, rel=1e-12)
        assert totals == evaluated(3)[0][key].totals, "two ranks differ"


@pytest.mark.timeout(90)
@pytest.mark.parametrize("key", EXACT, ids=str)
def test_exact_mode_totals_are_bit_identical(evaluated, key: Key) -> None:
    assert evaluated(3)[0][key].totals == evaluated(1)[0][key].totals


@pytest.mark.timeout(90)
@pytest.mark.parametrize("key", FAST + EXACT, ids=str)
def test_each_image_is_evaluated_on_exactly_one_rank(evaluated, key: Key) -> None:
    ranks, count = [rank[key] for rank in evaluated(3)], SPLITS[key[2]]
    ids = sorted(sample for rank in ranks for sample in rank.ids)
    assert ids == sorted(evaluated(1)[0][key].ids)
    assert len(set(ids)) == count
    batches = -(-count // key[3])
    assert [len(rank.images) for rank in ranks] == [batches] * 3
    for per_rank in zip(*(rank.shards for rank in ranks), strict=True):
        shards = [size for own in per_rank for size in own]
        assert len(shards) == (key[0] or 3)
        assert max(shards) - min(shards) <= 1
    if key[3] == 2:
        assert all(min(per_rank) == 0 for per_rank in zip(*(rank.images for rank in ranks), strict=True))


@pytest.mark.timeout(90)
def test_evaluation_mode_ends_with_the_evaluation(evaluated) -> None:
    modes = [rank[key].modes for world_size in (1, 3) for rank in evaluated(world_size) for key in rank]
    assert all(mode == ({False}, True) for mode in modes)


@in_group
def evaluate_with_a_missing_image(shards: int) -> str:
    config = small_config(
        Path("unused"), data={"train_samples": 20, "test_samples": 11}, exact={"shards": shards}, global_batch_size=8
    )
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    engine = build_engine(config, topology, data, CPU)
    if collectives.rank() == 1:
        complete = data.evaluation
        data.evaluation = lambda split: (_without_first(batch) for batch in complete(split))  # type: ignore[method-assign]
    try:
        evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(), device=CPU)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def _without_first(batch):
    first, *others = batch.shard_sizes
    return replace(batch, images=batch.images[1:], labels=batch.labels[1:], shard_sizes=(first - 1, *others))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shards", [0, 4], ids=["fast", "exact"])
def test_an_uncounted_image_is_an_error_on_every_rank(shards: int) -> None:
    assert (
        run_ranks(evaluate_with_a_missing_image, 2, shards)
        == ["evaluation counted 10 images, but the test split has 11"] * 2
    )
