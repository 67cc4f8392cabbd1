"""The key-value store in which torchrun's agents meet. The workers of a job on several nodes meet there too.

torchrun names its workers another store, MASTER_ADDR:MASTER_PORT, which an agent publishes once in its life. In a later
round of the rendezvous a new agent waits for an address that nobody publishes, the others wait for that agent, and no
worker starts: when a node joins, or a lost one returns, everything hangs (seen in torch 2.11 to 2.15). So the workers of one
round publish an address for the next ones. It may be of no use by then, so that the ranks meet in the agents' own store, which
is the same for all at any time. Its keys and its state are torch's internals, as of torch 2.14; if they cannot be read, the
ranks meet at MASTER_ADDR:MASTER_PORT.
"""

import os
import pickle
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from distributed.errors import InputError, PeerError
from distributed.topology import MeetingPlace, Topology, elastic_run_id, meeting_place, torchrun_above

_CONNECT_TIME = timedelta(seconds=30)  # our agent has a connection there; meanwhile no signal is heard
_ROUNDS_AHEAD = 16  # a round may pass without a worker, e.g. if a node is lost at its beginning


class AnotherJob(InputError):
    """This job met another one at its rendezvous, and has to leave."""


@dataclass(frozen=True)
class AgentStore:
    """The store of torchrun's agents, seen by a worker in one round of their rendezvous."""

    topology: Topology
    store: Store
    endpoint: MeetingPlace
    round: int
    launcher: int
    """Process id of this worker's agent."""

    @classmethod
    def find(cls, topology: Topology) -> Self | None:
        """The store; None if no torchrun started this process, for one node only, or in a way that gives no such store."""
        found = torchrun_above() if elastic_run_id() else None
        if found is None or (endpoint := _endpoint(found[1])) is None:
            return None
        launcher, (host, port) = found[0], endpoint
        try:
            store = TCPStore(host, port, is_master=False, timeout=_CONNECT_TIME)
            round = _round_of(launcher, topology.node_rank, store)
        except Exception:  # of torch's internals, in another version
            return None
        if round is None:
            return None
        return cls(topology, store, MeetingPlace(host, port, has_agent=True), round, launcher)

    def of_round(self, store: Store) -> Store:
        """The store's keys of this round's ranks."""
        return PrefixStore(f"distributed.{elastic_run_id()}.{self.round}", store)

    @property
    def keys(self) -> Store:
        """Keys of this round's ranks."""
        return self.of_round(self.store)

    def enter(self, job: str) -> None:
        """Publish what agents of the next rounds will wait for, and make sure that this round belongs to this job.

        Called early: if a new round begins before that, it hangs.

        Args:
            job: a digest of everything that distinguishes one job from another.

        Raises:
            AnotherJob: the rendezvous was begun by another job.
        """
        place = meeting_place()
        for round in range(self.round + 1, self.round + 1 + _ROUNDS_AHEAD):
            agents = PrefixStore(f"torch.rendezvous.{elastic_run_id()}.{round}", self.store)
            agents.compare_set("MASTER_ADDR", "", place.host)
            agents.compare_set("MASTER_PORT", "", str(place.port))
        self.keys.set(f"job/{self.topology.rank}", job)
        if self.store.compare_set(f"distributed.{elastic_run_id()}.job", "", job).decode() != job:
            raise AnotherJob(
                f"--rdzv-endpoint {self.endpoint}, --rdzv-id {elastic_run_id()}: another job, or this one with other "
                "settings, is running there; give each job its own --rdzv-id and port, and all its nodes the same command"
            )

    def look(self) -> None:
        """Raises PeerError if a rank of another job came into this round; it leaves, and torchrun begins a new round."""
        ranks = range(self.topology.world_size)
        there = [rank for rank in ranks if self.keys.check([f"job/{rank}"])]
        jobs = {rank: self.keys.get(f"job/{rank}") for rank in there}
        own = jobs.get(self.topology.rank)  # none of a rank that failed early, and only comes to say so
        foreign = [str(rank) for rank, job in jobs.items() if own and job != own]
        if foreign:
            raise PeerError(
                f"rank {', '.join(foreign)} is of another job, started with the same "
                f"--rdzv-endpoint {self.endpoint} and --rdzv-id {elastic_run_id()}; give each job its own --rdzv-id and port"
            )

    def leave(self) -> None:
        """End this worker's agent, once a node: its retries would disturb the job that was here first, and its failure
        would close the rendezvous to it."""
        if self.topology.local_rank == 0:
            os.kill(self.launcher, signal.SIGTERM)


def _endpoint(arguments: list[str]) -> tuple[str, int] | None:
    """Where torchrun's agents meet, given its arguments; None if each node has a store of its own or it is no TCPStore."""
    try:
        from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config, parse_rendezvous_endpoint
        from torch.distributed.run import parse_args

        given = parse_args(arguments)  # type: ignore[no-untyped-call]
        store = _parse_rendezvous_config(given.rdzv_conf).get("store_type", "tcp")
        host, port = parse_rendezvous_endpoint(given.rdzv_endpoint, default_port=29400)
    except (SystemExit, Exception):  # an option or a name of another version
        return None
    alone = given.standalone or str(given.nnodes).rpartition(":")[2] == "1" or not port
    return None if alone or given.rdzv_backend != "c10d" or store != "tcp" else (host, port)


def _round_of(launcher: int, node_rank: int, store: Store) -> int | None:
    """The round of the rendezvous that this worker's agent takes part in; None if it does not."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

    found = C10dRendezvousBackend(store, elastic_run_id()).get_state()
    if not found:
        return None
    state = pickle.loads(found[0])  # as the agents themselves read it
    ours = [node for node, rank in state.participants.items() if node.pid == launcher and rank == node_rank]
    return int(state.round) if ours else None
