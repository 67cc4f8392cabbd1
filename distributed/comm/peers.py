"""Failure notification between ranks: a failing rank publishes why, so that the others do not wait for it."""

import json
import os
import re
import socket
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from distributed.comm.agent_store import find_agent_store
from distributed.comm.rendezvous import agree_on_token, check_server
from distributed.comm.tcp_store import is_connected, open_store
from distributed.comm.torch_compat import PrefixStore, Store
from distributed.errors import ExitCode, PeerError
from distributed.host.identity import host
from distributed.process import exits
from distributed.process.deadline import try_within
from distributed.process.exits import Exit
from distributed.topology import Topology, rendezvous_endpoint

# Messages of gloo, NCCL and the store after the loss of a rank.
_LOST_PEER = re.compile(
    r"closed by peer|connection (was |is )?(reset|closed|refused|likely closed)|timed out waiting|wait timeout|"
    r"socket ?timeout|operation timeout|broken pipe|remote process|failed to recv|connectFullMesh",
    re.I,
)
_DEAD_RANK = re.compile(r"rank \d+, process \d+ on \S+, has died")  # from shared_memory.py
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 0.5  # lets a main thread that is already exiting finish on its own
_LINGER_SECONDS = 1.2  # how long the rank that serves the store stays, so that the others can read why it exits
_PUBLISH_SECONDS = 0.4  # an unresponsive store must not keep status.json from being written
_NOTIFY_SECONDS = 3.0
_CLOSING_SECONDS = 0.2  # a dying process closes its connections one after another
_has_connected = False


class Peers:
    """Context manager around all communication between ranks. `store` is private to this attempt.

    A thread with its own connection sends heartbeats and checks whether another rank has failed. If one has, and the main
    thread does not exit within a grace period, it is blocked in C++ on that rank: the process exits immediately, with the
    exit code of the failed rank.
    """

    def __init__(
        self, store: Store, connection: socket.socket | None, *, rank: int, world_size: int, server: str = "rank 0"
    ) -> None:
        self.store, self._watch_store, self._server = store, store.clone(), server
        self._connection, self.rank, self.world_size = connection, rank, world_size
        self._poll_seconds = _POLL_SECONDS + world_size / 1000  # a single server answers all ranks
        self._linger_seconds = _LINGER_SECONDS + 2 * world_size / 1000
        self._exiting, self._left = threading.Event(), threading.Event()
        self._has_left_store = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    @classmethod
    def connect(cls, topology: Topology, *, timeout_seconds: float) -> Self:
        """Wait for all ranks.

        Raises:
            InputError: they cannot rendezvous at MASTER_ADDR and MASTER_PORT.
            PeerError: some ranks did not arrive in time.
        """
        global _has_connected
        timeout = timedelta(seconds=timeout_seconds)
        agents = find_agent_store(topology)
        endpoint = agents.endpoint if agents else rendezvous_endpoint()
        rank, world_size = topology.rank, topology.world_size
        store, connection = open_store(endpoint, rank=rank, world_size=world_size, timeout=timeout)
        if agents:
            store = agents.with_round_prefix(store)
        try:
            token = agree_on_token(
                store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                endpoint=str(endpoint),
                connection=connection,
                check=agents.check_jobs if agents else None,
            )
            _has_connected = True
            server = "torchrun's agent" if endpoint.has_agent else "rank 0"
            return cls(PrefixStore(token, store), connection, rank=rank, world_size=world_size, server=server)
        except PeerError:
            raise
        except RuntimeError:  # from the store
            time.sleep(_CLOSING_SECONDS)
            check_server(connection, str(endpoint), world_size)
            raise

    def __enter__(self) -> Self:
        self._send_heartbeat(0)
        self._thread.start()
        exits.add_exit_hook(self._publish_exit, first=True)
        exits.add_exit_hook(self._leave_store_at_exit)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        exits.remove_exit_hook(self._publish_exit)
        exits.remove_exit_hook(self._leave_store_at_exit)
        self._exiting.set()
        try:
            if error is None:
                self._leave_store(seconds=5.0)
            elif isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) and not isinstance(error, PeerError):
                message = str(error)
                lost = try_within(12 * self._poll_seconds, lambda: self._find_cause(message))
                self._leave_store(seconds=self._linger_seconds)
                raise lost or self._unresponsive(message) from error
            else:
                self.publish_failure(getattr(error, "exit_code", ExitCode.FAILED), failure_message(error))
        finally:
            self._left.set()

    def publish_failure(self, code: ExitCode, reason: str) -> None:
        """Publish that this rank exits, and why. The other ranks exit with the same code."""
        try_within(1.0, lambda: self._publish(self.rank, Exit(code, reason)))
        self._leave_store(seconds=self._linger_seconds)

    def _publish(self, rank: int | None, final: Exit) -> dict[str, Any]:
        """Publish why the attempt ends, unless another rank has done so. Return what is published."""
        mine = json.dumps({"rank": rank, "code": int(final.code), "reason": final.reason})
        return dict(json.loads(self._watch_store.compare_set("end", "", mine)))

    def _published_failure(self) -> PeerError | None:
        """Return the failure that another rank has published, if any."""
        if not is_connected(self._connection) or not self._watch_store.check(["end"]):
            return None
        return _as_error(json.loads(self._watch_store.get("end")))

    def _publish_exit(self, final: Exit) -> Exit | None:
        """Exit hook: publish why this rank exits. If another rank was first, exit for its reason."""
        if not is_connected(self._connection):
            return None
        end = None if final.is_local else try_within(_PUBLISH_SECONDS, lambda: self._publish(self.rank, final))
        if end is None or end["rank"] == self.rank:
            return None
        other = _as_error(end)
        return final._replace(code=other.exit_code, reason=str(other))

    def _leave_store_at_exit(self, _: Exit) -> None:
        """Exit hook."""
        self._leave_store(seconds=self._linger_seconds)

    def _watch(self) -> None:
        """Send heartbeats, and exit the process if another rank has failed. Runs on a separate thread."""
        count = 0
        try:
            while not self._left.wait(self._poll_seconds) and is_connected(self._connection):
                count += 1
                self._send_heartbeat(count)
                failure = None if self._exiting.is_set() else self._published_failure()
                if failure and not self._exiting.wait(_GRACE_SECONDS):
                    exits.exit_now(failure.exit_code, str(failure), finishes_save=True)
        except RuntimeError:
            return  # the store is gone

    def _send_heartbeat(self, count: int) -> None:
        self._watch_store.set(f"heartbeat/{self.rank}", f"{count} process {os.getpid()} on {host()}")

    def _find_cause(self, message: str) -> PeerError:
        """Return why contact with a rank was lost: the failure it published, or which rank has stopped responding."""
        if self._server == "rank 0":
            time.sleep(_CLOSING_SECONDS)
        if not is_connected(self._connection):
            return PeerError(f"{self._server} has died: its connection was closed")
        if failure := self._published_failure():
            return failure
        if dead := _DEAD_RANK.search(message):
            lost = PeerError(dead[0])
        else:
            silent = self._silent_ranks()
            if failure := self._published_failure():
                return failure
            if not silent:
                return _lost_contact(message)
            lost = PeerError(f"{', '.join(silent)}: no heartbeat; it was killed, or it hangs")
        self._publish(None, Exit(lost.exit_code, str(lost)))
        return lost

    def _silent_ranks(self) -> list[str]:
        """Return descriptions of the ranks that have stopped sending heartbeats."""
        before = self._heartbeats()
        time.sleep(4 * self._poll_seconds)
        return [
            f"rank {rank} ({beat.partition(' ')[2]})" if beat else f"rank {rank}"
            for rank, beat in self._heartbeats().items()
            if beat == before[rank]
        ]

    def _heartbeats(self) -> dict[int, str]:
        """Return the latest heartbeat of every other rank; empty if it has sent none."""
        keys = {rank: f"heartbeat/{rank}" for rank in range(self.world_size) if rank != self.rank}
        store = self._watch_store
        return {rank: store.get(key).decode() if store.check([key]) else "" for rank, key in keys.items()}

    def _unresponsive(self, message: str) -> PeerError:
        if self._connection is None:
            return _lost_contact(message)
        return PeerError(f"{self._server} does not answer; it hangs, or its host was lost")

    def _leave_store(self, *, seconds: float) -> None:
        """Announce that this rank no longer needs the store. Its server waits for the others to leave first."""
        if self._has_left_store:
            return
        self._has_left_store = True

        def leave() -> None:
            if self._connection is not None:
                if is_connected(self._connection):
                    self._watch_store.add("left", 1)
                return
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self._watch_store.add("left", 0) < self.world_size - 1:
                time.sleep(0.01)

        try_within(seconds + 0.5, leave)


def _lost_contact(message: str) -> PeerError:
    return PeerError(f"contact with another rank was lost: {message.splitlines()[0]}")


def _as_error(end: dict[str, Any]) -> PeerError:
    """Return the error to raise for a published failure."""
    by = "" if end["rank"] is None else f"rank {end['rank']}: "
    return PeerError(f"{by}{end['reason']}", ExitCode(end["code"]))


def failure_message(error: BaseException) -> str:
    """Return an error as one line, with its type if its message is not meant for users."""
    text = "; ".join(str(error).splitlines())
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"


def notify_waiting_peers(topology: Topology, code: ExitCode, reason: str) -> None:
    """Publish a failure before the rendezvous to ranks that are waiting for this one. Takes a few seconds at most."""
    if _has_connected or not topology.has_waiting_peers:
        return

    def notify() -> None:
        with Peers.connect(topology, timeout_seconds=_NOTIFY_SECONDS) as peers:
            peers.publish_failure(code, reason)

    try_within(_NOTIFY_SECONDS + 2, notify)
