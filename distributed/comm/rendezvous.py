"""Meeting of the ranks of one attempt, apart from whatever a killed attempt left in the key-value store they share.

torchrun's restarted workers get the store of the agent again, with the addresses of dead peers in it, so that gloo's
connect fails (https://github.com/pytorch/pytorch/issues/135712). So the ranks first agree here on a token that no
earlier attempt had, and every key of theirs stands under it.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from torch._C._distributed_c10d import Store

from distributed.comm.tcp_store import SAME_PLACE, is_open
from distributed.errors import InputError, PeerError

_POLL_SECONDS = 0.01
_LOOK_SECONDS = 0.5


def agree_on_token(
    store: Store,
    *,
    rank: int,
    world_size: int,
    timeout: timedelta,
    where: str = "the meeting",
    connection: socket.socket | None = None,
    look: Callable[[], None] | None = None,
) -> str:
    """A token that exactly the living ranks share.

    Each rank says hello with a nonce of its own. Rank 0 publishes a token with the nonces it read; a rank that finds
    its own nonce there acknowledges; once all did, rank 0 says go. Leftovers of dead ranks cannot pass: their nonces are
    nobody's, their acknowledgements and their go name another token. A nonce that is overwritten by its living
    successor is met by a new proposal.

    Args:
        look: called while waiting; may raise if the wait is in vain.

    Raises:
        InputError: two processes have one rank, or ranks were given different numbers of ranks.
        PeerError: not all ranks came in time, which it names, or the server of the store has gone.
    """
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    wait = _Wait(world_size, timeout.total_seconds(), where, connection, look)
    if rank == 0:
        return _propose(store, nonce=nonce, world_size=world_size, wait=wait)
    silent = lambda: [other for other in range(world_size) if not store.check([f"hello/{other}"])] or [0]  # noqa: E731
    acknowledged = None
    while True:
        proposal = json.loads(_read(store, "proposal") or "{}")
        token = proposal.get("token")
        if proposal.get("nonces", {}).get(str(rank)) == nonce:
            if (size := proposal.get("world_size", world_size)) != world_size:
                store.set(f"acknowledged/{rank}", f"{token} {world_size}")
                raise _unlike(rank, world_size, size)
            if token != acknowledged:
                store.set(f"acknowledged/{rank}", token)
                acknowledged = token
            if _read(store, "go") == token:
                return str(token)
        if _read(store, f"hello/{rank}") != nonce:
            raise _twice(rank, where)
        wait(silent)


class _Wait:
    """A short wait for other ranks, to be repeated; raises PeerError if it is in vain."""

    def __init__(
        self,
        world_size: int,
        seconds: float,
        where: str,
        connection: socket.socket | None,
        look: Callable[[], None] | None,
    ) -> None:
        self._world_size, self._seconds, self._where, self._connection = world_size, seconds, where, connection
        self._look = look
        self._deadline, self._looked = time.monotonic() + seconds, 0.0

    def __call__(self, missing: Callable[[], list[int]]) -> None:
        now = time.monotonic()
        if (
            self._look and now > self._looked + _LOOK_SECONDS
        ):  # it asks for every rank, in the store of torchrun's agents
            self._looked = now
            self._look()
        if now > self._deadline:
            raise PeerError(
                f"rank {', '.join(map(str, missing()))} of {self._world_size} did not arrive at {self._where} within "
                f"{self._seconds:g} s; {SAME_PLACE}"
            )
        time.sleep(_POLL_SECONDS)
        check_open(self._connection, self._where, self._world_size)


def _twice(rank: int, where: str) -> InputError:
    return InputError(
        f"environment: RANK = {rank} was given to two processes that meet at {where}; give each its own, or end the "
        "process that was left behind"
    )


def check_open(connection: socket.socket | None, where: str, world_size: int) -> None:
    """Raises PeerError if the server of the store has gone."""
    if not is_open(connection):
        raise PeerError(f"the meeting at {where} was closed before all of {world_size} ranks had come")


def _unlike(rank: int, size: int, size_on_rank_0: int) -> InputError:
    return InputError(
        f"environment: WORLD_SIZE = {size} on rank {rank}, but {size_on_rank_0} on rank 0; start every rank with the same"
    )


def _propose(store: Store, *, nonce: str, world_size: int, wait: _Wait) -> str:
    proposed: dict[str, str] = {}
    token = ""
    others = range(1, world_size)
    while True:
        nonces = {str(rank): _read(store, f"hello/{rank}") for rank in others}
        if all(nonces.values()) and (nonces != proposed or not token):
            token, proposed = uuid.uuid4().hex, nonces
            proposal = {"token": token, "world_size": world_size, "nonces": {"0": nonce, **nonces}}
            store.set("proposal", json.dumps(proposal))
        answers = {rank: _read(store, f"acknowledged/{rank}").split() for rank in others}
        for rank, (answered, *size) in ((rank, answer) for rank, answer in answers.items() if answer):
            if size and answered == token:
                raise _unlike(rank, int(size[0]), world_size)
        missing = [rank for rank in others if not token or answers[rank] != [token]]
        if token and not missing:
            store.set("go", token)
            return token
        wait(partial(list, missing))


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
