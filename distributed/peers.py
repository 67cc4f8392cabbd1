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

from distributed import endings
from distributed.agent_store import AgentStore
from distributed.endings import Ending
from distributed.errors import ExitCode, PeerError
from distributed.rendezvous import agree_on_token, open_store, within
from distributed.topology import Topology, host, meeting_place

# What gloo, NCCL and the store say if another rank has gone.
_LOST = re.compile(
    r"closed by peer|connection (was |is )?(reset|closed|refused|likely closed)|timed out|broken pipe|socket ?timeout|"
    r"remote process|failed to recv|connectFullMesh",
    re.I,
)
_DEAD = re.compile(r"rank \d+, process \d+ on \S+, has died")  # shared_memory.py saw it
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 0.8  # for the main thread, which may be awake and on its way out by itself
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
        self._leaving, self._left = threading.Event(), threading.Event()
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
        token = agree_on_token(store, rank=rank, world_size=world_size, timeout=timeout, where=str(place), look=look)
        _met = True
        server = "torchrun's agent" if place.has_agent else "rank 0"
        return cls(PrefixStore(token, store), connection, rank=rank, world_size=world_size, server=server)

    def __enter__(self) -> Self:
        self._beat(0)
        self._thread.start()
        endings.add_last_word(self._settle)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        endings.remove_last_word(self._settle)
        self._leaving.set()
        try:
            if error is None:
                self._depart(seconds=5.0)
            elif isinstance(error, RuntimeError) and _LOST.search(str(error)) and not isinstance(error, PeerError):
                lost = within(6 * _POLL_SECONDS, lambda: self._cause(str(error)))
                raise lost or PeerError(f"contact with another rank was lost: {str(error).splitlines()[0]}") from error
            else:
                self.tell(getattr(error, "exit_code", ExitCode.FAILED), in_words(error))
        finally:
            self._left.set()

    def tell(self, code: ExitCode, reason: str) -> None:
        """Let the others know that this rank ends, and why."""
        within(1.0, lambda: self._publish(self.rank, Ending(code, reason)))
        self._depart(seconds=2.5 * _POLL_SECONDS)

    def _publish(self, rank: int | None, ending: Ending) -> dict[str, Any]:
        """Say why the attempt ends, unless another rank has; the first word holds."""
        mine = json.dumps({"rank": rank, "code": int(ending.code), "reason": ending.reason})
        return dict(json.loads(self._line.compare_set("end", "", mine)))

    def _end(self) -> PeerError | None:
        """What another rank has said."""
        if not self._is_served() or not self._line.check(["end"]):
            return None
        return _from_other(json.loads(self._line.get("end")))

    def _settle(self, ending: Ending) -> Ending | None:
        """The attempt's ending, as this process leaves at once; what another rank said before counts."""
        if not self._is_served():
            return None
        end = self._publish(self.rank, ending)
        if self._connection is not None:
            self._line.add("departed", 1)
        if end["rank"] == self.rank:
            return None
        other = _from_other(end)
        return Ending(other.exit_code, str(other))

    def _watch(self) -> None:
        beats = 0
        try:
            while not self._left.wait(_POLL_SECONDS) and self._is_served():
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
        if not self._is_served():
            return PeerError(f"{self._server} has died: its connection was closed")
        if end := self._end():
            return end
        if dead := _DEAD.search(said):
            lost = PeerError(dead[0])
        else:
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            before = self._line.multi_get([f"beat/{rank}" for rank in others])
            time.sleep(2.5 * _POLL_SECONDS)
            after = self._line.multi_get([f"beat/{rank}" for rank in others])
            silent = [
                f"rank {rank} ({new.decode().partition(' ')[2]})"
                for rank, old, new in zip(others, before, after, strict=True)
                if old == new
            ]
            if end := self._end():
                return end
            if not silent:
                return PeerError(f"contact with another rank was lost: {said.splitlines()[0]}")
            lost = PeerError(f"{', '.join(silent)} shows no sign of life; it was killed, or is frozen")
        self._publish(None, Ending(lost.exit_code, str(lost)))
        return lost

    def _is_served(self) -> bool:
        """Whether the store's server is there; asked before it is used, since its client is loud if not."""
        if self._connection is None:
            return True
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _depart(self, *, seconds: float) -> None:
        """Say that this rank needs the store no more; the rank that serves it leaves last."""

        def depart() -> None:
            if self._connection is not None:
                if self._is_served():
                    self._line.add("departed", 1)
                return
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self._line.add("departed", 0) < self.world_size - 1:
                time.sleep(0.01)

        within(seconds + 0.5, depart)


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
