"""Rendezvous of the ranks of one attempt, in a key-value store that may hold keys of killed attempts.

torchrun's restarted workers get the same store again. It still holds the addresses of dead peers, so that gloo's connect fails
(https://github.com/pytorch/pytorch/issues/135712). Therefore the ranks first agree on a new token, and prefix all
further keys with it.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from distributed.comm.tcp_store import SAME_ENDPOINT, is_connected
from distributed.comm.torch_compat import Store
from distributed.errors import InputError, PeerError

_POLL_SECONDS = 0.01
_CHECK_SECONDS = 0.5


def agree_on_token(
    store: Store,
    *,
    rank: int,
    world_size: int,
    timeout: timedelta,
    endpoint: str = "the rendezvous",
    connection: socket.socket | None = None,
    check: Callable[[], None] | None = None,
) -> str:
    """Return a token that exactly the living ranks of this attempt share.

    Each rank sets hello/RANK to a nonce of its own. Rank 0 proposes a token together with the nonces that it read; a rank
    that finds its nonce in the proposal acknowledges it; after all acknowledgements rank 0 sets go. Keys of dead ranks
    cannot complete this: their nonces belong to no living rank, and their acknowledgements and go name another token.
    When a restarted rank overwrites the nonce of its dead predecessor, rank 0 makes a new proposal.

    Args:
        endpoint: where the store is served, for messages.
        connection: a connection to the store's server, None on the server itself.
        check: called repeatedly while waiting; may raise to end the wait.

    Raises:
        InputError: two processes have the same rank, or the ranks have different world sizes.
        PeerError: ranks are missing after the timeout (named in the message), or the store's server has exited.
    """
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    poll = _Poll(world_size, timeout.total_seconds(), endpoint, connection, check)
    run = _propose if rank == 0 else _follow
    return run(store, rank=rank, nonce=nonce, world_size=world_size, poll=poll)


def check_server(connection: socket.socket | None, endpoint: str, world_size: int) -> None:
    """Raise PeerError if the store's server has exited."""
    if not is_connected(connection):
        raise PeerError(f"the rendezvous at {endpoint} was closed before all {world_size} ranks had arrived")


@dataclass
class _Poll:
    """A short sleep between two reads of the store. Raises PeerError after the timeout or if the server has exited."""

    world_size: int
    seconds: float
    endpoint: str
    connection: socket.socket | None
    check: Callable[[], None] | None

    def __post_init__(self) -> None:
        self._deadline, self._checked_at = time.monotonic() + self.seconds, 0.0

    def __call__(self, missing: Callable[[], list[int]]) -> None:
        now = time.monotonic()
        if self.check and now > self._checked_at + _CHECK_SECONDS:  # less often: it reads a key of every rank
            self._checked_at = now
            self.check()
        if now > self._deadline:
            raise PeerError(
                f"rank {', '.join(map(str, missing()))} of {self.world_size} did not arrive at {self.endpoint} within "
                f"{self.seconds:g} s; {SAME_ENDPOINT}"
            )
        time.sleep(_POLL_SECONDS)
        check_server(self.connection, self.endpoint, self.world_size)


def _propose(store: Store, *, rank: int, nonce: str, world_size: int, poll: _Poll) -> str:
    """Run rank 0's side of `agree_on_token`."""
    proposed: dict[str, str] = {}
    token = ""
    others = range(1, world_size)
    while True:
        nonces = {str(other): _read(store, f"hello/{other}") for other in others}
        if all(nonces.values()) and (nonces != proposed or not token):
            token, proposed = uuid.uuid4().hex, nonces
            proposal = {"token": token, "world_size": world_size, "nonces": {str(rank): nonce, **nonces}}
            store.set("proposal", json.dumps(proposal))
        answers = {other: _read(store, f"acknowledged/{other}").split() for other in others}
        for other, answer in answers.items():
            if len(answer) > 1 and answer[0] == token:  # a token with a world size is a refusal
                raise _unequal_world_sizes(other, int(answer[1]), world_size)
        missing = [other for other in others if not token or answers[other] != [token]]
        if token and not missing:
            store.set("go", token)
            return token
        poll(missing.copy)


def _follow(store: Store, *, rank: int, nonce: str, world_size: int, poll: _Poll) -> str:
    """Run the other ranks' side of `agree_on_token`."""

    def missing() -> list[int]:
        return [other for other in range(world_size) if not store.check([f"hello/{other}"])] or [0]

    acknowledged = None
    while True:
        proposal = json.loads(_read(store, "proposal") or "{}")
        token = proposal.get("token")
        if proposal.get("nonces", {}).get(str(rank)) == nonce:
            if (size := proposal.get("world_size", world_size)) != world_size:
                store.set(f"acknowledged/{rank}", f"{token} {world_size}")
                raise _unequal_world_sizes(rank, world_size, size)
            if token != acknowledged:
                store.set(f"acknowledged/{rank}", token)
                acknowledged = token
            if _read(store, "go") == token:
                return str(token)
        if _read(store, f"hello/{rank}") != nonce:
            raise InputError(
                f"environment: RANK = {rank} was given to two processes at {poll.endpoint}; give each its own "
                "rank, or end the process that was left behind"
            )
        poll(missing)


def _unequal_world_sizes(rank: int, size: int, size_on_rank_0: int) -> InputError:
    return InputError(
        f"environment: WORLD_SIZE = {size} on rank {rank}, but {size_on_rank_0} on rank 0; start every rank with the same"
    )


def _read(store: Store, key: str) -> str:
    """Return the value of a key; empty if it is not set."""
    return store.get(key).decode() if store.check([key]) else ""
