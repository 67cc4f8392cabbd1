"""Meeting of the ranks of one attempt: the key-value store they share, apart from whatever a killed attempt left there.

torchrun's restarted workers get the store of the agent again, with the addresses of dead peers in it, so that gloo's
connect fails (https://github.com/pytorch/pytorch/issues/135712). So the ranks first agree here on a token that no
earlier attempt had, and every key of theirs stands under it.
"""

import errno
import json
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import Store, TCPStore

from distributed.errors import InputError, PeerError
from distributed.topology import MeetingPlace

T = TypeVar("T")

_POLL_SECONDS = 0.01
_ANSWER_SECONDS = 5.0
_VALIDATE, _MAGIC, _PING = 0, 0x3C85F7CE, 13  # TCPStore's protocol; test_rendezvous.py fails if it changes
_WHERE = "start every rank with the same MASTER_ADDR and MASTER_PORT"


def open_store(
    place: MeetingPlace, *, rank: int, world_size: int, timeout: timedelta
) -> tuple[Store, socket.socket | None]:
    """The store in which the ranks meet, and a connection that closes with its server; None if this rank is the server.

    Waits in Python, so that a signal is heard: torch's own rendezvous waits in C++ for all ranks.

    Raises:
        InputError: something else listens there.
        PeerError: nothing answered in time.
    """
    if rank == 0 and not place.has_agent:
        handle = _listen(place)
        store = TCPStore(
            "localhost", place.port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=handle
        )
        return store, None
    deadline = time.monotonic() + timeout.total_seconds()
    absent = f"rank 0 of {world_size}" if not place.has_agent else "torchrun's agent"
    connection = _reach(place, deadline, f"{absent} did not arrive at {place} within {timeout.total_seconds():g} s")
    connect = lambda: TCPStore(place.host, place.port, world_size, False, timeout, wait_for_workers=False)  # noqa: E731
    client = within(max(1.0, deadline - time.monotonic()), connect)
    if client is None:
        raise PeerError(f"{absent} did not answer at {place} within {timeout.total_seconds():g} s")
    return client, connection


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` returns; None if it raises, or takes longer and is left to itself."""
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _listen(place: MeetingPlace) -> int:
    """A listening socket at the port, on all addresses of this host."""
    both = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", place.port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=2048, dualstack_ipv6=both
        )
    except OSError as error:
        raise InputError(
            f"environment: MASTER_PORT = {place.port}: {os.strerror(error.errno or errno.EIO)} on rank 0's host; give another "
            "port (torchrun --master_port PORT, or --standalone on one host)"
        ) from None
    return listener.detach()


def _reach(place: MeetingPlace, deadline: float, absent: str) -> socket.socket:
    """A connection to a store. Looks again until the deadline if nobody listens there yet, or does not answer."""
    foreign_since = 0.0
    said = "nothing listens there"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=1.0)
        except OSError as error:
            foreign_since, said = 0.0, error.strerror or str(error)
            time.sleep(0.05)
            continue
        connection.settimeout(min(_ANSWER_SECONDS, max(0.1, deadline - time.monotonic())))
        if (answers := _is_store(connection)) is True:
            connection.setblocking(False)
            return connection
        connection.close()
        if answers is None:
            foreign_since, said = 0.0, "what listens there does not answer"
            continue
        foreign_since = foreign_since or time.monotonic()
        if time.monotonic() - foreign_since > 1.0:  # not just a server that is going
            raise InputError(
                f"environment: MASTER_ADDR = {place.host!r} and MASTER_PORT = {place.port}: another program listens there; "
                "give another port (torchrun --master_port PORT, or --standalone on one host)"
            )
        time.sleep(0.2)
    raise PeerError(f"{absent} ({said}); {_WHERE}")


def _is_store(connection: socket.socket) -> bool | None:
    """Whether a TCPStore is at the other end; None if nothing was heard in time."""
    nonce = uuid.uuid4().int & 0xFFFFFFFF
    try:
        connection.sendall(struct.pack("=BIBI", _VALIDATE, _MAGIC, _PING, nonce))
        answer = b""
        while len(answer) < 4 and (more := connection.recv(4 - len(answer))):
            answer += more
    except TimeoutError:
        return None
    except OSError:
        return False
    return answer == struct.pack("=I", nonce)


def agree_on_token(
    store: Store,
    *,
    rank: int,
    world_size: int,
    timeout: timedelta,
    where: str = "the meeting",
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
        PeerError: not all ranks came in time; it names those that did not.
    """
    deadline, look = time.monotonic() + timeout.total_seconds(), look or _nothing
    within = f"of {world_size} did not arrive at {where} within {timeout.total_seconds():g} s; {_WHERE}"
    nonce = uuid.uuid4().hex
    store.set(f"hello/{rank}", nonce)
    if rank == 0:
        return _propose(store, nonce=nonce, world_size=world_size, deadline=deadline, within=within, look=look)
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
        if time.monotonic() > deadline:
            absent = [other for other in range(world_size) if not store.check([f"hello/{other}"])]
            raise PeerError(f"rank {', '.join(map(str, absent or [0]))} {within}")
        time.sleep(_POLL_SECONDS)


def _propose(
    store: Store, *, nonce: str, world_size: int, deadline: float, within: str, look: Callable[[], None]
) -> str:
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
        if time.monotonic() > deadline:
            raise PeerError(f"rank {', '.join(map(str, missing))} {within}")
        time.sleep(_POLL_SECONDS)


def _nothing() -> None: ...


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
