"""The key-value store in which ranks meet: served or reached at MASTER_ADDR:MASTER_PORT, with every wait in Python."""

import errno
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

SAME_PLACE = "start every rank with the same MASTER_ADDR and MASTER_PORT"
_ANSWER_SECONDS = 5.0
_VALIDATE, _MAGIC, _PING = 0, 0x3C85F7CE, 13  # TCPStore's protocol; test_tcp_store.py fails if it changes


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
        return _serve(place, world_size=world_size, timeout=timeout), None
    deadline = time.monotonic() + timeout.total_seconds()
    absent = f"rank 0 of {world_size}" if not place.has_agent else "torchrun's agent"
    connection = _reach(place, deadline, f"{absent} did not arrive at {place} within {timeout.total_seconds():g} s")
    connect = lambda: TCPStore(place.host, place.port, world_size, False, timeout, wait_for_workers=False)  # noqa: E731
    client = within(max(1.0, deadline - time.monotonic()), connect)
    if client is None:
        raise PeerError(f"{absent} did not answer at {place} within {timeout.total_seconds():g} s")
    return client, connection


_served: dict[int, Store] = {}  # the store of a run before in this process: every meeting has a token of its own


def _serve(place: MeetingPlace, *, world_size: int, timeout: timedelta) -> Store:
    if place.port not in _served:
        _served[place.port] = TCPStore(
            "localhost", place.port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=_listen(place)
        )
    _served[place.port].set_timeout(timeout)
    return _served[place.port]


def is_open(connection: socket.socket | None) -> bool:
    """Whether the store's server is there; asked before the store is used, since torch's client is loud if not."""
    if connection is None:
        return True
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


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
    for both in (True, False):
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", place.port), family=family, backlog=2048, dualstack_ipv6=both)
            return listener.detach()
        except (OSError, ValueError) as error:
            if both and getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                continue  # a host without IPv6
            raise InputError(
                f"environment: MASTER_PORT = {place.port}: {getattr(error, 'strerror', None) or error} on rank 0's host; "
                "give another port (torchrun --master_port PORT, or --standalone on one host)"
            ) from None
    raise AssertionError


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
    raise PeerError(f"{absent} ({said}); {SAME_PLACE}")


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
