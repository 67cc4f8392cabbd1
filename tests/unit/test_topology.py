import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.errors import InputError
from distributed.host.identity import host
from distributed.topology import Endpoint, Topology, has_launcher, is_first_on_node, rendezvous_endpoint
from distributed.train import check_one_task

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def set_variables(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def test_without_a_launcher_there_is_one_process(environment):
    topology = Topology.from_environment()
    assert topology == Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launched=False)
    assert topology.is_main


def test_torchrun_variables_are_read(environment):
    environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, GROUP_RANK=1)
    topology = Topology.from_environment()
    assert topology == Topology(5, 8, 1, 4, 1, launched=True)
    assert not topology.is_main


def test_separate_tasks_of_srun_are_refused(environment, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(InputError, match="SLURM_STEP_NUM_TASKS = 4: srun starts 4 separate runs"):
        check_one_task(Topology.from_environment())
    check_one_task(Topology(launched=True))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_one_task(Topology.from_environment())


def test_single_launched_process_counts_as_launched(environment):
    environment(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    assert Topology.from_environment() == Topology(launched=True)


def test_local_world_size_defaults_to_world_size(environment):
    environment(RANK=0, WORLD_SIZE=4, LOCAL_RANK=0)
    assert Topology.from_environment().local_world_size == 4


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_missing_variables_are_named(environment, missing):
    given = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    del given[missing]
    environment(**given)
    with pytest.raises(InputError, match=f"environment: {', '.join(given)} set without {missing};"):
        Topology.from_environment()


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": "one", "WORLD_SIZE": 2, "LOCAL_RANK": 0},
        {"RANK": 0, "WORLD_SIZE": "", "LOCAL_RANK": 0},
        {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0.5},
        {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": "x"},
        {"RANK": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 0},
        {"RANK": -1, "WORLD_SIZE": 2, "LOCAL_RANK": 0},
        {"RANK": 0, "WORLD_SIZE": 0, "LOCAL_RANK": 0},
    ],
)
def test_impossible_values_are_refused(environment, values):
    environment(**values)
    with pytest.raises(InputError, match="start with torchrun"):
        Topology.from_environment()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, False),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, True),
        ({"SLURM_STEP_ID": 0}, True),
        ({"SLURM_JOB_ID": 7}, False),
    ],
)
def test_shell_that_sets_rank_is_not_a_launcher(environment, monkeypatch, values, found):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    environment(**values)
    assert has_launcher() == found


@pytest.mark.parametrize(("local_rank", "prints"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_per_node_prints(environment, local_rank, prints):
    if local_rank:
        environment(LOCAL_RANK=local_rank)
    assert is_first_on_node() == prints


def test_endpoint_is_read_from_the_environment(environment, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    environment(MASTER_ADDR="node-1", MASTER_PORT=29500)
    assert rendezvous_endpoint() == Endpoint("node-1", 29500, has_agent=False)
    environment(MASTER_ADDR="fe80::1", TORCHELASTIC_USE_AGENT_STORE="True")
    assert str(rendezvous_endpoint()) == "[fe80::1]:29500"
    assert rendezvous_endpoint().has_agent


@pytest.mark.parametrize(
    ("ranks", "local_ranks", "agent", "awaited"),
    [(1, 1, "False", False), (2, 2, "False", True), (2, 2, "True", False), (2, 1, "True", True)],
)
def test_whether_peers_would_wait_for_this_rank(environment, ranks, local_ranks, agent, awaited):
    environment(RANK=0, WORLD_SIZE=ranks, LOCAL_RANK=0, LOCAL_WORLD_SIZE=local_ranks)
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=29500, TORCHELASTIC_USE_AGENT_STORE=agent)
    assert Topology.from_environment().has_waiting_peers == awaited


def test_threads_are_as_configured_or_a_share_of_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert Topology(local_world_size=2).threads(0) == 4
    assert Topology(local_world_size=3).threads(0) == 2
    assert Topology(local_world_size=16).threads(0) == 1
    assert Topology(local_world_size=2).threads(7) == 7


def test_threads_do_not_depend_on_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert Topology().threads(0) == 6


def test_host_has_a_name():
    assert host()


@pytest.mark.parametrize(
    ("job", "at_terminal", "description"),
    [
        ({}, False, ""),
        ({"SLURM_JOB_ID": "7"}, False, "Slurm job 7"),
        ({"SLURM_JOB_ID": "7"}, True, ""),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, True, "a Ray job"),
    ],
)
def test_salloc_shell_is_a_terminal_and_not_a_job(job: dict[str, str], at_terminal: bool, description: str):
    terminal, ours = os.openpty()
    found = subprocess.run(
        [sys.executable, "-c", "from distributed.topology import cluster_job; print(cluster_job())"],
        env={"PATH": os.environ["PATH"], **job}, stdout=subprocess.PIPE, text=True, check=True,
        stderr=ours if at_terminal else subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    os.close(terminal)
    os.close(ours)
    assert found.stdout.strip() == description
