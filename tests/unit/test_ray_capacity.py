"""How many workers fit where; against a real cluster: tests/integration/test_ray.py."""

import re

import pytest

from distributed.config import from_command_line
from distributed.config.scaling import Scaling

pytest.importorskip("ray", reason="ray is not installed")
from launch.on_ray import capacity, growth
from launch.on_ray.capacity import (
    Capacity,
    CapacityError,
    runs_on_cluster,
    wait_for_capacity,
    workers_on_cluster,
    workers_on_node,
)
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
    ("placement", "workers", "per_node", "count"),
    [
        ("pack", 4, [3, 3, 3], 2),
        ("strict_pack", 8, [8, 8, 7, 17], 4),
        ("strict_spread", 4, [8, 8, 8, 8], 8),
        ("strict_spread", 2, [1, 5, 1], 2),
        ("strict_spread", 2, [5], 0),
    ],
)
def test_a_sweep_runs_as_many_trials_at_once_as_fit(placement, workers, per_node, count):
    assert runs_on_cluster(Scaling(placement=placement, num_workers=workers), per_node) == count


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


requested: list[int] = []
"""The numbers of workers for which nodes were requested from the autoscaler, in order."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Capacities (now, when idle), one per look, the last of them for good; no pauses between looks."""
    looks: list[tuple[int, int]] = []

    def look(*_: object) -> Capacity:
        now, when_idle = looks.pop(0) if len(looks) > 1 else looks[0]
        return Capacity(now, when_idle, when_idle, "a node")

    monkeypatch.setattr(capacity, "capacity", look)
    monkeypatch.setattr(capacity, "request_resources", lambda bundles: requested.append(len(bundles)))
    requested.clear()
    monkeypatch.setattr(capacity, "_POLL_SECONDS", 0.0)
    return looks


ELASTIC = Scaling(num_workers=3, min_workers=1, wait_seconds=0)


@pytest.mark.parametrize(
    ("looks", "scaling", "workers"),
    [
        ([(3, 3)], ELASTIC, 3),
        ([(9, 9)], ELASTIC, 3),
        ([(2, 2)], ELASTIC, 2),
        ([(1, 3), (3, 3)], ELASTIC.model_copy(update={"wait_seconds": 60}), 3),
        ([(0, 2), (2, 2)], ELASTIC.model_copy(update={"wait_seconds": 60}), 2),
    ],
)
def test_as_many_workers_start_as_will_fit(cluster, looks, scaling, workers):
    cluster += looks
    assert wait_for_capacity(scaling, lambda: None, ()) == workers


def test_a_stop_ends_the_wait(cluster):
    cluster += [(0, 0)]
    assert wait_for_capacity(ELASTIC, lambda: "SIGTERM", ()) == 0


def test_a_stop_withdraws_the_request_for_nodes(cluster, monkeypatch):
    monkeypatch.setattr(capacity, "_SETTLE_SECONDS", 0.0)
    cluster += [(0, 0)]
    waiting = ELASTIC.model_copy(update={"wait_seconds": 60})
    assert wait_for_capacity(waiting, lambda: "SIGTERM" if requested else None, ()) == 0
    assert requested == [3, 0]


def test_a_request_for_nodes_is_renewed(cluster, monkeypatch):
    """Ray Train replaces it by requests of its own."""
    monkeypatch.setattr(capacity, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(capacity, "REQUEST_SECONDS", 0.01)
    cluster += [(0, 0)]
    waiting = ELASTIC.model_copy(update={"wait_seconds": 60})
    assert wait_for_capacity(waiting, lambda: "SIGTERM" if len(requested) > 2 else None, ()) == 0
    assert requested == [3, 3, 3, 0]


def test_a_run_on_fewer_workers_requests_more(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "REQUEST_SECONDS", 0.0)
    sent: list[int] = []

    def send(scaling: Scaling, workers: int) -> None:
        sent.append(workers)
        raise RuntimeError("the head is away for a moment")

    monkeypatch.setattr(growth, "request_nodes", send)
    config = from_command_line(["--data.name", "generated10", "--run_dir", str(tmp_path)]).config
    for workers in (3, 1):
        monitor = growth.GrowthMonitor(config, ELASTIC, workers, ())
        monitor.request_nodes()
        monitor.withdraw_request()
    assert sent == [3, 0], "a run with all workers requests none"


def test_a_training_of_a_sweep_waits_for_the_workers_of_another(cluster):
    cluster += [(0, 3)] * 5 + [(3, 3)]
    assert wait_for_capacity(ELASTIC, lambda: None, (), busy_is_enough=True) == 3
    cluster[:] = [(0, 0)]  # a lost node releases none
    with pytest.raises(CapacityError):
        wait_for_capacity(ELASTIC, lambda: None, (), busy_is_enough=True)


def test_too_small_a_cluster_is_an_error_with_its_nodes(cluster):
    cluster += [(0, 2)]
    message = re.escape(
        "scaling.num_workers = 3 (scaling.min_workers = 1): the cluster has capacity for 0 workers of 1 CPU each (pack), "
        "2 when idle: a node; lower scaling.num_workers"
    )
    with pytest.raises(CapacityError, match=message):
        wait_for_capacity(ELASTIC, lambda: None, ())
