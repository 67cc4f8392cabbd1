"""The key-value store at MASTER_ADDR:MASTER_PORT: serving it and connecting to it, with all waiting done in Python."""

import errno
import socket
import struct
import time
import uuid
from datetime import timedelta
from typing import NamedTuple

from distributed.comm.torch_compat import TCP_STORE_MAGIC, TCP_STORE_PING, TCP_STORE_VALIDATE, Store, TCPStore
from distributed.errors import InputError, PeerError
from distributed.process.deadline import try_within
from distributed.topology import Endpoint

SAME_ENDPOINT = (
    "start every rank with the same MASTER_ADDR and MASTER_PORT, or raise timeout_seconds if one still reads its data"
)
_ANSWER_SECONDS = 5.0
_AGENT_SECONDS = 10.0  # it listens before it starts a rank, and the run's next attempt waits 30 s for the folder
_FOREIGN_SECONDS = 1.0  # a store that is shutting down may look like a foreign program for a moment


class OpenStore(NamedTuple):
    """A store, and a connection that is closed when its server exits. The server itself has no connection."""

    store: Store
    connection: socket.socket | None


def open_store(endpoint: Endpoint, *, rank: int, world_size: int, timeout: timedelta) -> OpenStore:
    """Open the store of the ranks: serve it on rank 0, connect to it on the others.

    Waits in Python, so that signals are handled: torch's own rendezvous waits for all ranks in C++.

    Raises:
        InputError: another program listens there.
        PeerError: nothing answered in time.
    """
    if rank == 0 and not endpoint.has_agent:
        return OpenStore(_serve(endpoint, world_size=world_size, timeout=timeout), None)
    deadline = time.monotonic() + timeout.total_seconds()
    server = f"rank 0 of {world_size}" if not endpoint.has_agent else "torchrun's agent"
    seconds = f"{timeout.total_seconds():g} s"
    connection = _connect(endpoint, deadline, f"{server} did not arrive at {endpoint} within {seconds}")
    client = try_within(
        max(1.0, deadline - time.monotonic()),
        lambda: TCPStore(endpoint.host, endpoint.port, world_size, False, timeout, wait_for_workers=False),
    )
    if client is None:
        raise PeerError(f"{server} did not answer at {endpoint} within {seconds}")
    return OpenStore(client, connection)


_served: dict[int, Store] = {}  # by port; a later run in the same process uses the same store, under another token


def _serve(endpoint: Endpoint, *, world_size: int, timeout: timedelta) -> Store:
    port = endpoint.port
    if port not in _served:
        _served[port] = TCPStore(
            "localhost", port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=_listen(port)
        )
    _served[port].set_timeout(timeout)
    return _served[port]


def is_connected(connection: socket.socket | None) -> bool:
    """Whether the store's server is alive. Call it before each use: torch's client logs a stack trace if it is not.

    `connection` is None on the server itself.
    """
    if connection is None:
        return True
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _listen(port: int) -> int:
    """Return the descriptor of a socket that listens on all addresses of this host, IPv6 included if it has that."""
    for dual_stack in (True, False):
        try:
            family = socket.AF_INET6 if dual_stack else socket.AF_INET
            listener = socket.create_server(("", port), family=family, backlog=2048, dualstack_ipv6=dual_stack)
            return listener.detach()
        except (OSError, ValueError) as error:
            if dual_stack and getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
                continue  # a host without IPv6
            raise InputError(
                f"environment: MASTER_PORT = {port}: {getattr(error, 'strerror', None) or error} on rank 0's host; "
                "give another port (torchrun --master_port PORT, or --standalone on one host)"
            ) from None
    raise AssertionError


def _connect(endpoint: Endpoint, deadline: float, timeout_message: str) -> socket.socket:
    """Return a connection to the store. Retries until the deadline while nothing listens there or answers."""
    foreign_since, refused_since, problem = 0.0, 0.0, "nothing listens there"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((endpoint.host, endpoint.port), timeout=1.0)
        except OSError as error:
            foreign_since, problem = 0.0, error.strerror or str(error)
            refused_since = (refused_since or time.monotonic()) if isinstance(error, ConnectionRefusedError) else 0.0
            if endpoint.has_agent and refused_since and time.monotonic() - refused_since > _AGENT_SECONDS:
                raise PeerError(f"torchrun's agent at {endpoint} has ended: nothing listens there") from None
            time.sleep(0.05)
            continue
        refused_since = 0.0
        connection.settimeout(min(_ANSWER_SECONDS, max(0.1, deadline - time.monotonic())))
        if (is_store := _is_store(connection)) is True:
            connection.setblocking(False)
            return connection
        connection.close()
        if is_store is None:
            foreign_since, problem = 0.0, "the program that listens there does not answer"
            continue
        foreign_since = foreign_since or time.monotonic()
        if time.monotonic() - foreign_since > _FOREIGN_SECONDS:
            raise InputError(
                f"environment: MASTER_ADDR = {endpoint.host!r} and MASTER_PORT = {endpoint.port}: another program listens "
                "there; give another port (torchrun --master_port PORT, or --standalone on one host)"
            )
        time.sleep(0.2)
    raise PeerError(f"{timeout_message} ({problem}); {SAME_ENDPOINT}")


def _is_store(connection: socket.socket) -> bool | None:
    """Whether the other end is a TCPStore; None if it did not answer in time."""
    nonce = uuid.uuid4().int & 0xFFFFFFFF
    try:
        connection.sendall(struct.pack("=BIBI", TCP_STORE_VALIDATE, TCP_STORE_MAGIC, TCP_STORE_PING, nonce))
        answer = b""
        while len(answer) < 4 and (more := connection.recv(4 - len(answer))):
            answer += more
    except TimeoutError:
        return None
    except OSError:
        return False
    return answer == struct.pack("=I", nonce)
