"""Evaluation counts every image once, however unevenly the ranks share them, and all ranks know the totals."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import in_group, once, run_ranks

from distributed import collectives
from distributed.build import build_data, build_engine
from distributed.loop import evaluate
from distributed.sums import Totals
from distributed.topology import Topology
from multiprocess.small_runs import small_config

CPU = torch.device("cpu")
TEST, TRAIN, VALIDATION = 23, 60, 20


@dataclass(frozen=True)
class Evaluated:
    """One split, passed over in batches of one size: the totals, how many images this rank saw of each, its modes."""

    totals: Totals
    shards: list[int]
    ids: list[int]
    modes: tuple[bool, bool]


@in_group
def evaluate_splits(sizes: list[int]) -> dict[tuple[str, int], Evaluated]:
    found = {}
    for size in sizes:
        config = small_config(
            Path("unused"),
            precision="float64",
            evaluation={"batch_size": size},
            data={"train_samples": TRAIN + VALIDATION, "test_samples": TEST, "validation_fraction": 0.25},
        )
        data = build_data(config, Topology(collectives.rank(), collectives.world_size()), CPU)
        engine = build_engine(config, data, CPU)
        for split in ("validation", "test"):
            seen = []
            engine.model.register_forward_pre_hook(lambda model, _, seen=seen: seen.append(model.training))
            totals = evaluate(engine, data, split, device=CPU)
            batches = list(data.evaluation(split))
            found[split, size] = Evaluated(
                totals,
                [len(batch.labels) for batch in batches],
                [int(sample) for batch in batches for sample in batch.sample_ids],
                (any(seen), engine.model.training),
            )
    return found


# Of batches of 9 the last is uneven; of 2 over three ranks always one rank has none; 1000 is more than there are.
SIZES = [9, 2, 1000]


@pytest.fixture(scope="module")
def evaluated() -> object:
    return once(lambda world_size: run_ranks(evaluate_splits, world_size, SIZES))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("split", "count"), [("validation", VALIDATION), ("test", TEST)])
def test_three_ranks_have_the_totals_of_one(evaluated, split: str, count: int, size: int) -> None:
    alone = evaluated(1)[0][split, size].totals
    assert alone.count == count
    assert 0 < alone.correct5 < count
    for rank in evaluated(3):
        totals = rank[split, size].totals
        assert (totals.count, totals.correct, totals.correct5) == (count, alone.correct, alone.correct5)
        assert totals.mean_loss == pytest.approx(alone.mean_loss, rel=1e-12)
        assert totals == evaluated(3)[0][split, size].totals, "two ranks differ"


@pytest.mark.timeout(90)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("split", "count"), [("validation", VALIDATION), ("test", TEST)])
def test_each_image_is_on_one_rank_and_all_ranks_make_as_many_passes(
    evaluated, split: str, count: int, size: int
) -> None:
    ranks = [rank[split, size] for rank in evaluated(3)]
    ids = sorted(sample for rank in ranks for sample in rank.ids)
    assert ids == sorted(evaluated(1)[0][split, size].ids)
    assert len(set(ids)) == count
    passes = -(-count // size)
    assert [len(rank.shards) for rank in ranks] == [passes] * 3
    for of_a_pass in zip(*(rank.shards for rank in ranks), strict=True):
        assert max(of_a_pass) - min(of_a_pass) <= 1
    if size == 2:
        assert all(min(of_a_pass) == 0 for of_a_pass in zip(*(rank.shards for rank in ranks), strict=True))


@pytest.mark.timeout(90)
def test_the_model_evaluates_in_evaluation_mode_and_trains_on_after_it(evaluated) -> None:
    assert {rank[key].modes for rank in evaluated(3) for key in rank} == {(False, True)}


@in_group
def evaluate_a_split_that_lacks_an_image() -> str:
    config = small_config(Path("unused"), data={"train_samples": 20, "test_samples": 11})
    data = build_data(config, Topology(collectives.rank(), collectives.world_size()), CPU)
    engine = build_engine(config, data, CPU)
    if collectives.rank() == 1:
        whole = data.evaluation
        data.evaluation = lambda split: (_without_first(batch) for batch in whole(split))  # type: ignore[method-assign]
    try:
        evaluate(engine, data, "test", device=CPU)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def _without_first(batch):
    from dataclasses import replace

    return replace(batch, images=batch.images[1:], labels=batch.labels[1:])


@pytest.mark.timeout(60)
def test_an_image_that_is_not_counted_is_an_error_on_every_rank() -> None:
    assert (
        run_ranks(evaluate_a_split_that_lacks_an_image, 2)
        == ["evaluation counted 10 images of the test split's 11"] * 2
    )
