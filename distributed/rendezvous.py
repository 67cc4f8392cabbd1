"""Meeting of the ranks of one attempt, apart from whatever a killed attempt left in the launcher's key-value store.

torchrun's restarted workers get the store of the agent again, with the addresses of dead peers in it, so that gloo's
connect fails (https://github.com/pytorch/pytorch/issues/135712). So the ranks first agree here on a token that no
earlier attempt had, and every key of theirs stands under it.
"""

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

_POLL_SECONDS = 0.01


def agree_on_token(
    store: Store, *, rank: int, world_size: int, timeout: timedelta, look: Callable[[], None] | None = None
) -> str:
    """A token that exactly the living ranks share.

    Each rank says hello with a nonce of its own. Rank 0 publishes a token with the nonces it read; a rank that finds
    its own nonce there acknowledges; once all did, rank 0 says go. Leftovers of dead ranks cannot pass: their nonces are
    nobody's, their acknowledgements and their go name another token. A nonce that is overwritten by its living
    successor is met by a new proposal.

    Args:
        look: called while waiting; may raise if the wait is in vain.

    Raises:
        TimeoutError: not all ranks came in time.
    """
    deadline, look = time.monotonic() + timeout.total_seconds(), look or _nothing
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    if rank == 0:
        return _propose(store, nonce=nonce, world_size=world_size, deadline=deadline, look=look)
    acknowledged = None
    while True:
        proposal = json.loads(_read(store, "proposal") or "{}")
        token = proposal.get("token")
        if proposal.get("nonces", {}).get(str(rank)) == nonce:
            if token != acknowledged:
                store.set(f"acknowledged/{rank}", token)
                acknowledged = token
            if _read(store, "go") == token:
                return str(token)
        look()
        _wait(deadline, f"rank {rank}: rank 0 did not answer")


def _propose(store: Store, *, nonce: str, world_size: int, deadline: float, look: Callable[[], None]) -> str:
    proposed: dict[str, str] = {}
    token = ""
    others = range(1, world_size)
    while True:
        nonces = {str(rank): _read(store, f"hello/{rank}") for rank in others}
        if all(nonces.values()) and (nonces != proposed or not token):
            token, proposed = uuid.uuid4().hex, nonces
            store.set("proposal", json.dumps({"token": token, "nonces": {"0": nonce, **nonces}}))
        missing = [rank for rank in others if not token or _read(store, f"acknowledged/{rank}") != token]
        if token and not missing:
            store.set("go", token)
            return token
        look()
        _wait(deadline, f"rank 0: no word from rank {', '.join(map(str, missing))}")


def _nothing() -> None: ...


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{what} before the time was up; were all processes started?")
    time.sleep(_POLL_SECONDS)
