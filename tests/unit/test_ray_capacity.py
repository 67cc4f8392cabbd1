"""How many workers fit where; against a real cluster: tests/integration/test_ray.py."""

import pytest

from distributed.config.sections import Scaling

pytest.importorskip("ray", reason="ray is not installed")
from launch.on_ray.capacity import workers_on_cluster, workers_on_node
from launch.on_ray.cluster import open_cluster_warning


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
def test_the_scarcest_resource_limits_a_node(resources, scaling, count):
    assert workers_on_node(scaling, resources) == count


@pytest.mark.parametrize(("placement", "count"), [("pack", 6), ("spread", 6), ("strict_pack", 3), ("strict_spread", 2)])
def test_strict_placements_count_nodes_or_the_largest(placement, count):
    assert workers_on_cluster(Scaling(placement=placement), [3, 3, 0]) == count


@pytest.mark.parametrize(
    ("addresses", "token", "message"),
    [
        (["127.0.0.1", "10.0.0.7"], False, "the Ray cluster on 10.0.0.7 requires no token"),
        (["fd00::7"], False, "the Ray cluster on fd00::7"),
        (["10.0.0.7"], True, ""),
        (["127.0.0.1", "::1", "localhost", "127.9.9.9"], False, ""),
        ([], False, ""),
    ],
)
def test_an_open_cluster_on_a_network_is_warned_about(addresses, token, message):
    assert open_cluster_warning(addresses, token=token).startswith(message)
    assert bool(message) == bool(open_cluster_warning(addresses, token=token))
