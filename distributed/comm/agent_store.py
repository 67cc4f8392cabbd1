"""The key-value store of torchrun's agents, in which the workers of a multi-node job rendezvous too.

torchrun gives its workers another store, MASTER_ADDR:MASTER_PORT, whose address an agent publishes once in its lifetime. In
a later rendezvous round a new agent waits for an address that is never published, the other agents wait for the new one,
and no worker starts: the job hangs when a node joins or returns (seen in torch 2.11 to 2.15). Therefore the workers of each
round publish an address for the next rounds. That address may be stale by then, so the ranks rendezvous in the agents'
own store, whose address never changes. If it cannot be found, they use MASTER_ADDR:MASTER_PORT.
"""

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from distributed.comm import torch_compat
from distributed.comm.torch_compat import PrefixStore, Store, TCPStore
from distributed.errors import InputError, PeerError
from distributed.topology import Endpoint, Topology, elastic_run_id, find_torchrun, rendezvous_endpoint

_CONNECT_TIMEOUT = timedelta(seconds=30)  # our agent is connected already; signals are not handled while connecting
_ROUNDS_AHEAD = 16  # a round may pass without any worker, e.g. if a node is lost at its start


class ForeignJobError(InputError):
    """Another job already uses this job's rendezvous."""


@dataclass(frozen=True)
class AgentStore:
    """The store of torchrun's agents, as seen by a worker in one rendezvous round."""

    topology: Topology
    store: Store
    endpoint: Endpoint
    round: int
    agent_pid: int

    @classmethod
    def find(cls, topology: Topology) -> Self | None:
        """Connect to the store.

        Return None without torchrun, on a single node, or if the agents share no such store.
        """
        torchrun = find_torchrun() if elastic_run_id() else None
        if torchrun is None or (found := torch_compat.c10d_endpoint(torchrun.arguments)) is None:
            return None
        endpoint = Endpoint(*found, has_agent=True)
        try:
            store = TCPStore(endpoint.host, endpoint.port, is_master=False, timeout=_CONNECT_TIMEOUT)
            number = torch_compat.rendezvous_round(
                store, elastic_run_id(), agent_pid=torchrun.pid, node_rank=topology.node_rank
            )
        except Exception:  # the internals of another torch version may raise anything
            return None
        return None if number is None else cls(topology, store, endpoint, number, torchrun.pid)

    def with_round_prefix(self, store: Store) -> Store:
        """Return a view of `store` with the keys of this round's ranks."""
        return PrefixStore(f"distributed.{elastic_run_id()}.{self.round}", store)

    @property
    def keys(self) -> Store:
        """The keys of this round's ranks."""
        return self.with_round_prefix(self.store)

    def register(self, job: str) -> None:
        """Publish the addresses that agents of later rounds wait for, and register this rank's job.

        Must be called early: a new round that begins before this call hangs.

        Args:
            job: a digest of everything that distinguishes one job from another.

        Raises:
            ForeignJobError: another job started this rendezvous.
        """
        address = rendezvous_endpoint()
        for number in range(self.round + 1, self.round + 1 + _ROUNDS_AHEAD):
            torch_compat.publish_worker_address(
                self.store, elastic_run_id(), number, host=address.host, port=address.port
            )
        self.keys.set(f"job/{self.topology.rank}", job)
        if self.store.compare_set(f"distributed.{elastic_run_id()}.job", "", job).decode() != job:
            raise ForeignJobError(
                f"--rdzv-endpoint {self.endpoint}, --rdzv-id {elastic_run_id()}: another job, or this one with other "
                "settings, is running there; give each job its own --rdzv-id and port, and all its nodes the same command"
            )

    def check_jobs(self) -> None:
        """Raise PeerError if a rank of another job joined this round. That rank exits, and torchrun starts a new round."""
        rank = self.topology.rank
        ranks = range(self.topology.world_size) if rank == 0 else (0, rank)  # all reading all would take too long
        registered = [rank for rank in ranks if self.keys.check([f"job/{rank}"])]
        jobs = {rank: self.keys.get(f"job/{rank}") for rank in registered}
        own = jobs.get(rank)  # missing if this rank failed early and only publishes its failure
        foreign = [str(rank) for rank, job in jobs.items() if own and job != own]
        if foreign:
            raise PeerError(
                f"rank {', '.join(foreign)} belongs to another job, started with the same "
                f"--rdzv-endpoint {self.endpoint} and --rdzv-id {elastic_run_id()}; give each job its own --rdzv-id and port"
            )

    def stop_agent(self) -> None:
        """Terminate this node's agent; a no-op on all but local rank 0.

        Otherwise the agent's restarts would disturb the other job, and its failure would close the rendezvous.
        """
        if self.topology.local_rank == 0:
            os.kill(self.agent_pid, signal.SIGTERM)


_found: dict[Topology, AgentStore] = {}


def find_agent_store(topology: Topology) -> AgentStore | None:
    """`AgentStore.find`, with one connection per process: a worker belongs to a single round."""
    if topology not in _found and (store := AgentStore.find(topology)):
        _found[topology] = store
    return _found.get(topology)
