"""Ranks in containers on one machine, with separate namespaces for processes, host names and shared memory."""

import os
import subprocess
import sys

import pytest
from kit.cluster import free_ports
from kit.commands import ROOT

# In a shell, which says so if there is no unshare.
TRIED = subprocess.run("unshare --pid --fork --uts --mount-proc mount -t tmpfs x /dev/shm",
                       shell=True, capture_output=True, text=True, check=False)  # fmt: skip
pytestmark = pytest.mark.skipif(bool(TRIED.returncode), reason=f"no namespaces here: {TRIED.stderr.strip()}")

# Rank 1 is late, so that rank 0 checks whether it is alive; then it exits.
RANK = """
import os, time, torch
from distributed.comm.process_group import process_group
from distributed.comm.all_gather import open_all_gather
from distributed.topology import Topology

topology, device = Topology.from_environment(), torch.device("cpu")
with process_group(topology, device, timeout_seconds=30):
    gather = open_all_gather(device, timeout_seconds=30)
    print(type(gather).__name__)
    time.sleep(topology.rank)
    print(gather(torch.tensor([topology.rank])).flatten().tolist())
    if topology.rank == 1:
        os._exit(0)
    start = time.monotonic()
    try:
        gather(torch.tensor([0]))
    except RuntimeError as error:
        print("by peer" in str(error).lower() and time.monotonic() - start < 20, error)
    os._exit(0)
"""
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "sh", "-c"]
CONTAINERS = {
    "the same name": (['exec "$@"'] * 2, "SharedMemoryAllGather"),
    "other names": (['hostname first; exec "$@"', 'hostname second; exec "$@"'], "SharedMemoryAllGather"),
    "own memory": (['mount -t tmpfs x /dev/shm; exec "$@"'] * 2, "function"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", CONTAINERS)
def test_ranks_in_containers_see_each_other_alive(kind: str) -> None:
    """In its own namespace, each rank has a process id near 1."""
    starts, kind_of_gather = CONTAINERS[kind]
    [port] = free_ports(1)
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [*ALONE, start, "sh", sys.executable, "-c", RANK],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, start in enumerate(starts)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    first = outputs[0][0].split("\n")
    assert first[:2] == [kind_of_gather, "[0, 1]"], outputs
    assert first[2].startswith("True"), outputs
    assert outputs[1][0].split("\n")[:2] == [kind_of_gather, "[0, 1]"], outputs
