"""The agents' store, tested against torch's own rendezvous in threads."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistStoreError, HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from distributed.comm import agent_store
from distributed.comm.agent_store import AgentStore, ForeignJobError, find_agent_store
from distributed.comm.rendezvous import agree_on_token
from distributed.comm.torch_compat import c10d_endpoint, rendezvous_round
from distributed.topology import Topology

C10D = ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:1234", "--nnodes=1:2", "train.py"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    for name, value in (given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


class Agents:
    """Agents of one rendezvous, created like torchrun does; each has a higher rank than the one before."""

    def __init__(self) -> None:
        self._host = self._backend(port=0, is_host=True)
        self.store = self._host[1]
        self.created: list[RendezvousHandler] = []

    def _backend(self, *, port: int, is_host: bool) -> tuple[Any, Any, RendezvousParameters]:
        parameters = RendezvousParameters(
            "c10d", f"127.0.0.1:{port}", "test", 1, 2, local_addr="127.0.0.1", is_host=is_host, read_timeout=2,
            last_call_timeout=1, join_timeout=20,
        )  # fmt: skip
        return (*create_backend(parameters), parameters)

    def add(self) -> RendezvousHandler:
        backend, store, parameters = self._backend(port=self.store.port, is_host=False)
        self.created.append(create_handler(store, backend, parameters))
        return self.created[-1]

    def worker(self, node_rank: int) -> AgentStore:
        """The store as a worker of the agent with this rank sees it in the current round."""
        number = rendezvous_round(self.store, "test", agent_pid=os.getpid(), node_rank=node_rank)
        assert number is not None
        topology = Topology(rank=node_rank, world_size=node_rank + 1, node_rank=node_rank, launched=True)
        return AgentStore(topology, self.store, f"127.0.0.1:{self.store.port}", number, agent_pid=0)


@pytest.fixture
def agents() -> Iterator[Agents]:
    agents = Agents()
    yield agents
    for one in agents.created:
        one._stop_heartbeats()  # type: ignore[attr-defined]


def test_agent_joins_a_later_round(agents: Agents) -> None:
    first = agents.add()
    assert first.next_rendezvous().world_size == 1
    agents.worker(0).register("job")
    with ThreadPoolExecutor(2) as pool:
        joined = [pool.submit(one.next_rendezvous) for one in (first, agents.add())]
        assert [one.result().rank for one in joined] == [0, 1]
    workers = [agents.worker(rank) for rank in (0, 1)]
    assert [one.round for one in workers] == [1, 1]
    for one in workers:
        one.register("job")
    workers[1].check_jobs()


def test_agent_hangs_if_no_worker_publishes_an_address(agents: Agents) -> None:
    """Negative control: the bug in torch that agent_store works around. If this fails, the module may be unnecessary."""
    first = agents.add()
    first.next_rendezvous()
    with ThreadPoolExecutor(2) as pool:
        again, joined = [pool.submit(one.next_rendezvous) for one in (first, agents.add())]
        again.result()
        with pytest.raises(DistStoreError):
            joined.result()


def test_round_without_our_agent_is_not_used(agents: Agents) -> None:
    agents.add().next_rendezvous()
    assert rendezvous_round(agents.store, "test", agent_pid=os.getpid(), node_rank=0) == 0
    assert rendezvous_round(agents.store, "test", agent_pid=os.getpid(), node_rank=1) is None
    assert rendezvous_round(agents.store, "test", agent_pid=os.getppid(), node_rank=0) is None
    assert rendezvous_round(HashStore(), "test", agent_pid=os.getpid(), node_rank=0) is None


def members(world_size: int) -> list[AgentStore]:
    store = HashStore()
    return [
        AgentStore(Topology(rank, world_size, node_rank=rank, launched=True), store, "HOST:1234", 3, agent_pid=0)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("newcomer", [0, 1])
def test_foreign_job_is_refused_at_any_rank(newcomer: int) -> None:
    ranks = members(2)
    ranks[1 - newcomer].register("first")
    with pytest.raises(
        ForeignJobError, match=r"HOST:1234, --rdzv-id test: another job, .* give each job its own --rdzv-id"
    ):
        ranks[newcomer].register("second")


def test_first_job_does_not_wait_for_a_foreign_rank() -> None:
    first, second = members(2)
    first.register("first")
    with pytest.raises(ForeignJobError):
        second.register("second")
    with pytest.raises(RuntimeError, match="rank 1 belongs to another job"):
        agree_on_token(first.keys, rank=0, world_size=2, timeout=timedelta(seconds=20), check=first.check_jobs)


def test_jobs_with_different_rdzv_ids_are_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = members(2)
    first.register("first")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "own")
    second.register("second")
    assert second.keys.check(["job/1"])
    assert not second.keys.check(["job/0"]), "the first job's rank"
    second.check_jobs()


def test_only_local_rank_0_stops_the_agent() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as agent:
        for local_rank in (1, 0):
            assert agent.poll() is None
            AgentStore(Topology(local_rank, 2, local_rank, 2), HashStore(), "", 0, agent_pid=agent.pid).stop_agent()
    assert agent.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (C10D, ("HOST", 1234)),
        (["--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST", "--nnodes", "2", "-m", "x"], ("HOST", 29400)),
        ([*C10D[:-1], "--nnodes=1", "x.py"], None),
        ([*C10D[:-1], "--nnodes=1:1", "x.py"], None),
        ([*C10D[:-1], "--standalone", "x.py"], None),
        (["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:0", "--nnodes=1:2", "x.py"], None),
        (["--rdzv-backend=static", "--rdzv-endpoint=HOST:1", "--nnodes=2", "x.py"], None),
        (["--master-addr=HOST", "--master-port=1", "--nnodes=2", "x.py"], None),
        ([*C10D[:-1], "--rdzv-conf=store_type=file", "x.py"], None),
        ([*C10D[:-1], "--rdzv-conf=is_host=1,store_type=tcp", "x.py"], ("HOST", 1234)),
        ([*C10D[:-1], "--an-option-of-another-version", "x.py"], None),
        ([], None),
    ],
)
def test_endpoint_is_parsed_from_torchrun_arguments(arguments: list[str], found: tuple[str, int] | None) -> None:
    assert c10d_endpoint(arguments) == found


@pytest.mark.parametrize("shells", [0, 1, 2])
def test_torchrun_is_found_among_the_parents(shells: int, tmp_path: Any) -> None:
    script = tmp_path / "torchrun"
    worker = "import distributed.topology as t; print(t.find_torchrun().arguments, t.is_elastic())"
    command = [sys.executable, "-c", worker]
    for _ in range(shells):
        command = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"]
    script.write_text(f"import subprocess; subprocess.run({command!r})")
    found = subprocess.run([sys.executable, script, *C10D], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{C10D} True", found.stderr


def test_without_torchrun_there_is_no_agent_store() -> None:
    assert AgentStore.find(Topology(launched=True)) is None


def test_agent_store_is_found_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    (member,), calls = members(1), []
    monkeypatch.setattr(agent_store, "_found", {})
    monkeypatch.setattr(AgentStore, "find", lambda topology: calls.append(topology) or member)
    assert find_agent_store(member.topology) is find_agent_store(member.topology) is member
    assert len(calls) == 1
