"""Arithmetic of what fits where; against a real cluster: tests/integration/test_ray.py."""

import pytest

from distributed.config.sections import Scaling

pytest.importorskip("ray", reason="ray is not installed")
from launch.on_ray.cluster import _fitting, _together, open_to_all


@pytest.mark.parametrize(
    ("resources", "scaling", "count"),
    [
        ({"CPU": 7.0}, Scaling(cpus_per_worker=2), 3),
        ({"CPU": 7.0, "GPU": 2.0}, Scaling(cpus_per_worker=2, gpus_per_worker=1), 2),
        ({"CPU": 1.0, "GPU": 8.0}, Scaling(cpus_per_worker=2, gpus_per_worker=1), 0),
        ({"CPU": 64.0}, Scaling(gpus_per_worker=1), 0),
        ({}, Scaling(), 0),
    ],
)
def test_a_node_has_room_for_what_its_scarcest_resource_allows(resources, scaling, count):
    assert _fitting(scaling, resources) == count


@pytest.mark.parametrize(("placement", "count"), [("pack", 6), ("spread", 6), ("strict_pack", 3), ("strict_spread", 2)])
def test_strict_placements_count_nodes_or_the_largest(placement, count):
    assert _together(Scaling(placement=placement), [3, 3, 0]) == count


@pytest.mark.parametrize(
    ("addresses", "token", "said"),
    [
        (["127.0.0.1", "10.0.0.7"], False, "the Ray cluster on 10.0.0.7 asks for no token"),
        (["fd00::7"], False, "the Ray cluster on fd00::7"),
        (["10.0.0.7"], True, ""),
        (["127.0.0.1", "::1", "localhost", "127.9.9.9"], False, ""),
        ([], False, ""),
    ],
)
def test_a_cluster_on_a_network_without_a_token_is_warned_of(addresses, token, said):
    assert open_to_all(addresses, token=token).startswith(said)
    assert bool(said) == bool(open_to_all(addresses, token=token))
