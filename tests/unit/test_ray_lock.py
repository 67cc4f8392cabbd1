"""The lock of a run folder whose holder was on a lost node of a Ray cluster."""

import fcntl

import pytest
from filelock import FileLock

from distributed.files import replace_json
from distributed.run.lock_holder import acquire_lock

pytest.importorskip("ray", reason="ray is not installed")
from launch.on_ray import cluster, compat


@pytest.mark.parametrize(("is_alive", "is_released"), [(False, True), (True, False)])
def test_the_lock_of_a_lost_node_is_released(tmp_path, monkeypatch, is_alive, is_released):
    nodes = [
        compat.ClusterNode("1", is_alive, "gone", "10.0.0.1", {}),
        compat.ClusterNode("2", True, "here", "10.0.0.2", {}),
    ]
    monkeypatch.setattr(compat, "cluster_nodes", lambda: nodes)
    replace_json(tmp_path / "attempt.json", {"token": "x", "pid": 7, "host": "gone"})
    with open(tmp_path / ".lock", "w") as held:  # as the file server still believes
        fcntl.flock(held, fcntl.LOCK_EX)
        cluster.release_lock_of_lost_node(tmp_path)
        assert (tmp_path / ".lock").exists() is not is_released
        if is_released:
            lock = FileLock(tmp_path / ".lock")
            acquire_lock(lock, record=tmp_path / "attempt.json", seconds=0.3)
            lock.release()
