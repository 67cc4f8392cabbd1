"""Ranks whose imported networks differ are refused; a network that was compared can still be sharded."""

import pytest
from kit.ranks import in_group, run_ranks
from torch import nn

from distributed.comm import collectives
from distributed.errors import InputError
from distributed.network import check_same_weights


def network(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


@in_group
def compare() -> list[bool]:
    model = network(1.0)
    check_same_weights(model, name="net:make")
    with pytest.raises(InputError, match=r"net:make: rank 1 built a different network .* \(0\.weight differs\)"):
        check_same_weights(network(float(collectives.rank())), name="net:make")
    return [parameter.untyped_storage().resizable() for parameter in model.parameters()]


def test_weights_are_compared_and_stay_resizable() -> None:
    """Sharded weights free and allocate their memory by resizing it."""
    assert run_ranks(compare, 2) == [[True] * 4] * 2
