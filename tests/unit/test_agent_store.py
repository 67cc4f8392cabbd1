"""With torch's own rendezvous, in threads: what agents of a later round find, and whom the ranks of a round meet."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch.distributed import DistStoreError, HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from distributed import agent_store
from distributed.agent_store import AgentStore, AnotherJob
from distributed.topology import Topology

ENDPOINT = "127.0.0.1:29400"
C10D = ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:1234", "--nnodes=1:2"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)


class Agents:
    """Agents of one rendezvous, as torchrun makes them."""

    def __init__(self) -> None:
        self._server = self._backend("127.0.0.1:0", is_host=True)
        self._port = self._server[1].port
        self.store = self._server[1]
        self._handlers: list[RendezvousHandler] = []

    def _backend(self, endpoint: str, *, is_host: bool) -> tuple:
        parameters = RendezvousParameters("c10d", endpoint, "test", 1, 2, is_host=is_host, read_timeout=2)
        return (*create_backend(parameters), parameters)

    def agent(self) -> RendezvousHandler:
        backend, store, parameters = self._backend(f"127.0.0.1:{self._port}", is_host=False)
        parameters.config.update(last_call_timeout=1, join_timeout=20)
        parameters.local_addr = f"127.0.0.{9 - len(self._handlers)}"  # so that the newest is rank 0
        self._handlers.append(create_handler(store, backend, parameters))
        return self._handlers[-1]

    def close(self) -> None:
        for handler in self._handlers:
            handler.shutdown()


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents()
    yield made
    made.close()


def worker(agents: Agents, topology: Topology) -> AgentStore:
    number = agent_store._round_of(os.getpid(), topology.node_rank, agents.store)
    assert number is not None
    return AgentStore(topology, agents.store, ENDPOINT, number, launcher=0)


@pytest.mark.parametrize("entered", [True, False])
def test_an_agent_joins_a_later_round(agents: Agents, entered: bool) -> None:
    """Without the worker's keys it fails, or hangs if torch waits longer: the control."""
    first = agents.agent()
    assert first.next_rendezvous().world_size == 1
    if entered:
        worker(agents, Topology(launched=True)).enter("job")
    second, third = agents.agent(), None
    with ThreadPoolExecutor(2) as pool:
        joining = pool.submit(second.next_rendezvous)
        again = pool.submit(first.next_rendezvous)
        assert (joining.result().rank, again.result().rank) == (0, 1)
        # The second leaves, a third comes: rank 0 is new again, and rank 1 the one whose address is two rounds old.
        second.shutdown()
    assert third is None
    agents._handlers.remove(second)


def test_a_new_agent_that_is_not_rank_0_needs_the_keys(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "_handlers", [])
    first = agents.agent()
    first.next_rendezvous()
    second = agents.agent()
    second._this_node = replace(second._this_node, addr="127.0.1.1") if hasattr(second, "_this_node") else None
    with pytest.raises((DistStoreError, Exception)):
        second.next_rendezvous()
