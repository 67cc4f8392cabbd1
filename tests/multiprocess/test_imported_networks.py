"""Networks by import path on two processes: sharded like built-in ones, and the same on every rank."""

from pathlib import Path

import pytest
import torch
from kit.engines import ENGINES, built, config_with, copied, difference, steps
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config
from torch import Tensor

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
        "model.name = kit.tied_network:of_each_rank: rank 1 built a different network from rank 0 (head.bias differs); "
    )


@in_group
def steps_of_views() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Return losses and weights of two steps in exact mode, by engine."""
    found = {}
    for engine in ("ddp", "fsdp"):
        config = small_config(
            Path("unused"), engine=ENGINES[engine], model={"name": "kit.view_network:Views"}, exact={"shards": 4}
        )
        made, data = built(config)
        losses, _ = steps(made, data, config, lr=0.01, count=2)
        found[engine] = losses, copied(made)
    return found


def test_parameters_that_are_views_are_trained_alike() -> None:
    """In memory of others, e.g. weight = Parameter(large.weight[:, :8]); with FSDP in fast mode they are refused by torch."""
    ranks = [*run_ranks(steps_of_views, 1), *run_ranks(steps_of_views, 2)]
    expected_losses, expected = ranks[0]["ddp"]
    for rank in ranks:
        for losses, found in rank.values():
            assert losses == expected_losses
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@in_group
def fast_fsdp(name: str) -> str:
    try:
        config = config_with("fsdp", model={"name": f"kit.view_network:{name}"})
        made, data = built(config)
        steps(made, data, config, lr=0.01)
    except InputError as error:
        return str(error)
    return "trained"


def test_fsdp_takes_channels_last_weights_and_refuses_scalars() -> None:
    assert run_ranks(fast_fsdp, 2, "Views") == ["trained"] * 2
    for message in run_ranks(fast_fsdp, 2, "Scaled"):
        assert message.startswith(
            "model.name = kit.view_network:Scaled: engine.name = fsdp cannot shard scale, which has no"
        )
