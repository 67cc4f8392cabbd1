"""What the ranks of an attempt know of each other's end: a rank that fails says so, and the others do not wait for it."""

import json
import os
import re
import socket
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from torch._C._distributed_c10d import PrefixStore, Store

from distributed.comm.agent_store import AgentStore
from distributed.comm.rendezvous import agree_on_token, check_open
from distributed.comm.tcp_store import is_open, open_store, within
from distributed.errors import ExitCode, PeerError
from distributed.process import endings
from distributed.process.endings import Ending
from distributed.topology import Topology, host, meeting_place

# What gloo, NCCL and the store say if another rank has gone.
_LOST = re.compile(
    r"closed by peer|connection (was |is )?(reset|closed|refused|likely closed)|timed out waiting|wait timeout|"
    r"socket ?timeout|operation timeout|broken pipe|remote process|failed to recv|connectFullMesh",
    re.I,
)
_DEAD = re.compile(r"rank \d+, process \d+ on \S+, has died")  # shared_memory.py saw it
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 0.5  # for the main thread, which may be awake and on its way out by itself
_LINGER_SECONDS = 1.2  # of the rank that serves the store, for the others to read why it ends
_LIMIT_SECONDS = 0.4  # a store that does not answer must not keep status.json from being written
_ATTEND_SECONDS = 3.0
_met = False


class Peers:
    """A context around everything that ranks do together. `store` is theirs alone, under a token that no other attempt has.

    A thread on a connection of its own shows that this rank lives, and looks whether another has failed. If one has, and
    the main thread does not end by itself, it waits in C++ for that rank: the process ends with that rank's exit code.
    """

    def __init__(
        self, store: Store, connection: socket.socket | None, *, rank: int, world_size: int, server: str = "rank 0"
    ) -> None:
        self.store, self._line, self._server = store, store.clone(), server
        self._connection, self.rank, self.world_size = connection, rank, world_size
        self._poll_seconds = _POLL_SECONDS + world_size / 1000  # one server answers all
        self._linger_seconds = _LINGER_SECONDS + 2 * world_size / 1000
        self._leaving, self._left = threading.Event(), threading.Event()
        self._has_departed = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    @classmethod
    def meet(cls, topology: Topology, *, timeout_seconds: float) -> Self:
        """Wait for all ranks.

        Raises:
            InputError: they cannot meet at MASTER_ADDR and MASTER_PORT.
            PeerError: not all came in time.
        """
        global _met
        timeout = timedelta(seconds=timeout_seconds)
        agents = AgentStore.find(topology)
        place = agents.endpoint if agents else meeting_place()
        rank, world_size = topology.rank, topology.world_size
        store, connection = open_store(place, rank=rank, world_size=world_size, timeout=timeout)
        if agents:
            store = agents.of_round(store)
        look = agents.look if agents else None
        server = "torchrun's agent" if place.has_agent else "rank 0"
        try:
            token = agree_on_token(
                store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                where=str(place),
                connection=connection,
                look=look,
            )
            _met = True
            return cls(PrefixStore(token, store), connection, rank=rank, world_size=world_size, server=server)
        except PeerError:
            raise
        except RuntimeError:  # of the store
            time.sleep(0.2)  # a dying process closes its connections one after another
            check_open(connection, str(place), world_size)
            raise

    def __enter__(self) -> Self:
        self._beat(0)
        self._thread.start()
        endings.add_last_word(self._settle, first=True)
        endings.add_last_word(self._linger)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        endings.remove_last_word(self._settle)
        endings.remove_last_word(self._linger)
        self._leaving.set()
        try:
            if error is None:
                self._depart(seconds=5.0)
            elif isinstance(error, RuntimeError) and _LOST.search(str(error)) and not isinstance(error, PeerError):
                lost = within(12 * self._poll_seconds, lambda: self._cause(str(error))) or self._no_answer(str(error))
                self._depart(seconds=self._linger_seconds)
                raise lost from error
            else:
                self.tell(getattr(error, "exit_code", ExitCode.FAILED), in_words(error))
        finally:
            self._left.set()

    def tell(self, code: ExitCode, reason: str) -> None:
        """Let the others know that this rank ends, and why."""
        within(1.0, lambda: self._publish(self.rank, Ending(code, reason)))
        self._depart(seconds=self._linger_seconds)

    def _publish(self, rank: int | None, ending: Ending) -> dict[str, Any]:
        """Say why the attempt ends, unless another rank has; the first word holds."""
        mine = json.dumps({"rank": rank, "code": int(ending.code), "reason": ending.reason})
        return dict(json.loads(self._line.compare_set("end", "", mine)))

    def _end(self) -> PeerError | None:
        """What another rank has said."""
        if not is_open(self._connection) or not self._line.check(["end"]):
            return None
        return _from_other(json.loads(self._line.get("end")))

    def _settle(self, ending: Ending) -> Ending | None:
        """The attempt's ending, as this process leaves at once; what another rank said before counts."""
        if not is_open(self._connection):
            return None
        end = None if ending.is_alone else within(_LIMIT_SECONDS, lambda: self._publish(self.rank, ending))
        if end is None or end["rank"] == self.rank:
            return None
        other = _from_other(end)
        return Ending(other.exit_code, str(other))

    def _linger(self, _: Ending) -> None:
        self._depart(seconds=self._linger_seconds)

    def _watch(self) -> None:
        beats = 0
        try:
            while not self._left.wait(self._poll_seconds) and is_open(self._connection):
                beats += 1
                self._beat(beats)
                end = None if self._leaving.is_set() else self._end()
                if end and not self._leaving.wait(_GRACE_SECONDS):
                    endings.leave(end.exit_code, str(end))
        except RuntimeError:
            return  # the store has gone

    def _beat(self, number: int) -> None:
        self._line.set(f"beat/{self.rank}", f"{number} process {os.getpid()} on {host()}")

    def _cause(self, said: str) -> PeerError:
        """Why contact with a rank was lost: its own word, or which rank has fallen silent."""
        if self._server == "rank 0":
            time.sleep(0.2)  # a dying process closes its connections one after another
        if not is_open(self._connection):
            return PeerError(f"{self._server} has died: its connection was closed")
        if end := self._end():
            return end
        if dead := _DEAD.search(said):
            lost = PeerError(dead[0])
        else:
            before = self._beats()
            time.sleep(4 * self._poll_seconds)
            silent = [
                f"rank {rank} ({beat.partition(' ')[2]})" if beat else f"rank {rank}"
                for rank, beat in self._beats().items()
                if beat == before[rank]
            ]
            if end := self._end():
                return end
            if not silent:
                return _lost_contact(said)
            lost = PeerError(f"{', '.join(silent)} shows no sign of life; it was killed, or is frozen")
        self._publish(None, Ending(lost.exit_code, str(lost)))
        return lost

    def _beats(self) -> dict[int, str]:
        """The newest sign of life of every other rank, empty if there was none."""
        keys = {rank: f"beat/{rank}" for rank in range(self.world_size) if rank != self.rank}
        return {rank: self._line.get(key).decode() if self._line.check([key]) else "" for rank, key in keys.items()}

    def _no_answer(self, said: str) -> PeerError:
        if self._connection is None:
            return _lost_contact(said)
        return PeerError(f"{self._server} does not answer; it is frozen, or its host was lost")

    def _depart(self, *, seconds: float) -> None:
        """Say that this rank needs the store no more; the rank that serves it leaves last."""

        if self._has_departed:
            return
        self._has_departed = True

        def depart() -> None:
            if self._connection is not None:
                if is_open(self._connection):
                    self._line.add("departed", 1)
                return
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self._line.add("departed", 0) < self.world_size - 1:
                time.sleep(0.01)

        within(seconds + 0.5, depart)


def _lost_contact(said: str) -> PeerError:
    return PeerError(f"contact with another rank was lost: {said.splitlines()[0]}")


def _from_other(end: dict[str, Any]) -> PeerError:
    by = "" if end["rank"] is None else f"rank {end['rank']}: "
    return PeerError(f"{by}{end['reason']}", ExitCode(end["code"]))


def in_words(error: BaseException) -> str:
    """An error in one line; its kind where the message is not meant to be read alone."""
    text = "; ".join(str(error).splitlines())
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"


def tell_waiting(topology: Topology, code: ExitCode, reason: str) -> None:
    """Let ranks that wait for this one to come know that it has failed on its way; not for long if they are not there."""
    if _met or not topology.is_awaited:
        return

    def attend() -> None:
        with Peers.meet(topology, timeout_seconds=_ATTEND_SECONDS) as peers:
            peers.tell(code, reason)

    within(_ATTEND_SECONDS + 2, attend)
