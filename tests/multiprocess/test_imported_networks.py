"""Networks by import path on two processes: sharded like built-in ones, and the same on every rank."""

from pathlib import Path

import pytest
from kit.engines import built, config_with, copied, difference, steps
from kit.ranks import in_group, run_ranks

from distributed.errors import InputError

NETWORKS = ("kit.networks:vit_b_16", "kit.tied_network:Tied")


@in_group
def differences_of_fsdp(name: str) -> tuple[float, float]:
    """Return the differences of losses and weights between FSDP and DDP after two steps in float64."""
    results = []
    for engine in ("ddp", "fsdp"):
        config = config_with(engine, model={"name": name}, precision="float64", global_batch_size=13)
        made, data = built(config)
        losses, _ = steps(made, data, config, lr=0.01, count=2)
        results.append((losses, copied(made)))
    (expected, weights), (losses, found) = results
    assert found.keys() == weights.keys()
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True)), difference(found, weights, "model")


@pytest.mark.parametrize("name", NETWORKS)
def test_fsdp_takes_the_steps_of_ddp(name: str) -> None:
    for rank in run_ranks(differences_of_fsdp, 2, name):
        assert max(rank) < 1e-12


@in_group
def refusal() -> str:
    with pytest.raises(InputError) as caught:
        built(config_with("ddp", Path("unused"), model={"name": "kit.tied_network:of_each_rank"}))
    return str(caught.value)


def test_a_network_that_differs_between_ranks_is_refused() -> None:
    messages = run_ranks(refusal, 2)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        "model.name = kit.tied_network:of_each_rank: rank 1 built another network than rank 0, with another head.bias; "
    )
