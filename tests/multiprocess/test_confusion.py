"""The confusion matrix is exact, however unevenly the images are sharded."""

from pathlib import Path

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.errors import InputError
from distributed.evaluate import check_same_checkpoint
from distributed.inference.confusion import ConfusionMatrix, Counts
from distributed.topology import Topology
from distributed.training.losses import CROSS_ENTROPY
from distributed.training.steps import evaluate
from distributed.training.views import Views

CPU = torch.device("cpu")
TEST = 23
# Shards (0 for fast mode) and batch size: with 9 the last batch is uneven; with 2 one of three ranks has no images.
KEYS = [(0, 9), (0, 2), (8, 9), (8, 2)]


@in_group
def counted(keys: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[Counts, int]]:
    """Return the confusion matrix and the number of correct predictions by key."""
    found = {}
    topology = Topology(collectives.rank(), collectives.world_size())
    for shards, batch_size in keys:
        config = small_config(
            Path("unused"), exact={"shards": shards}, precision="float64", data={"test_samples": TEST},
            evaluation={"batch_size": batch_size},
        )  # fmt: skip
        data = build_data(config, topology, CPU)
        engine = build_engine(config, topology, data, CPU)
        confusion = ConfusionMatrix(data.num_classes, CPU)
        totals = evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(), device=CPU, observers=[confusion])
        found[shards, batch_size] = confusion.read(), totals.correct
    return found


@in_group
def refusal() -> str:
    """Return why ranks that have resolved `latest` at different times do not evaluate."""
    check_same_checkpoint(Path("run/checkpoints/step-00000003-epoch-001"))
    newest = Path(f"run/checkpoints/step-0000000{3 + collectives.rank()}-epoch-001")
    with pytest.raises(InputError) as caught:
        check_same_checkpoint(newest)
    return str(caught.value)


def test_ranks_with_different_checkpoints_do_not_evaluate() -> None:
    expected = "--checkpoint: the ranks found step-00000003-epoch-001 and step-00000004-epoch-001; name one of them"
    assert run_ranks(refusal, 2) == [expected] * 2


@pytest.mark.timeout(120)
def test_three_ranks_count_the_same_as_one() -> None:
    alone, together = run_ranks(counted, 1, KEYS)[0], run_ranks(counted, 3, KEYS)
    for key in KEYS:
        counts, correct = alone[key]
        assert [sum(row) for row in counts] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]  # 23 images, classes in turn
        assert sum(counts[label][label] for label in range(10)) == correct
        assert [rank[key] for rank in together] == [(counts, correct)] * 3
