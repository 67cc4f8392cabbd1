import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import pytest
from torch.distributed import HashStore, Store, TCPStore

from distributed.errors import InputError, PeerError
from distributed.rendezvous import _is_store, agree_on_token, open_store
from distributed.topology import MeetingPlace


def tokens(store: HashStore, world_size: int) -> list[str]:
    with ThreadPoolExecutor(world_size) as pool:
        works = [
            pool.submit(agree_on_token, store, rank=rank, world_size=world_size, timeout=timedelta(seconds=10))
            for rank in reversed(range(world_size))
        ]
        return [work.result() for work in works]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_get_one_token(world_size):
    assert len(set(tokens(HashStore(), world_size))) == 1


def test_attempts_over_the_same_store_get_tokens_of_their_own():
    store = HashStore()
    attempts = [tokens(store, 3) for _ in range(4)]
    assert [len(set(attempt)) for attempt in attempts] == [1] * 4
    assert len({attempt[0] for attempt in attempts}) == 4


def test_what_a_dead_attempt_left_half_done_is_passed_over():
    store = HashStore()
    store.set("proposal", json.dumps({"token": "old", "nonces": {"0": "a", "1": "b"}}))
    for key, value in {"hello/0": "a", "hello/1": "b", "acknowledged/1": "old", "go": "old"}.items():
        store.set(key, value)
    first, second = tokens(store, 2)
    assert first == second != "old"


def test_a_rank_that_does_not_come_is_named():
    short = timedelta(seconds=0.05)
    with pytest.raises(PeerError, match=r"^rank 1 of 2 did not arrive at here:1 within 0.05 s; "):
        agree_on_token(HashStore(), rank=0, world_size=2, timeout=short, where="here:1")
    with pytest.raises(PeerError, match=r"^rank 0, 2 of 3 did not arrive at here:1 within 0.05 s; "):
        agree_on_token(HashStore(), rank=1, world_size=3, timeout=short, where="here:1")


# The store


def a_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def place(port: int, *, has_agent: bool = False) -> MeetingPlace:
    return MeetingPlace("127.0.0.1", port, has_agent)


def opened(port: int, rank: int, *, seconds: float = 5, has_agent: bool = False) -> tuple[Store, socket.socket | None]:
    return open_store(place(port, has_agent=has_agent), rank=rank, world_size=2, timeout=timedelta(seconds=seconds))


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A port where another program listens: it answers anything with that and closes; None: it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    taken.append(connection)
                    if answer is not None:
                        connection.recv(64)
                        connection.sendall(answer)
                        connection.close()

        Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


def test_the_handshake_is_that_of_this_torch():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        assert _is_store(connection) is True


def test_rank_0_serves_and_another_rank_may_come_first():
    port = a_port()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(opened, port, 1)
        time.sleep(0.2)
        served, nothing = opened(port, 0)
        store, connection = other.result()
    served.set("key", "value")
    assert (store.get("key"), nothing) == (b"value", None)
    with pytest.raises(BlockingIOError):  # open, and nothing to read
        connection.recv(1)


def test_under_an_agent_rank_0_is_a_client():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store, connection = opened(server.port, 0, has_agent=True)
    server.set("key", "value")
    assert store.get("key") == b"value"
    assert connection is not None


def test_a_taken_port_is_refused_with_the_remedy():
    with (
        answering(None) as port,
        pytest.raises(InputError, match=f"MASTER_PORT = {port}: Address already in use.*--standalone"),
    ):
        opened(port, 0)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 4, b"x", b""]
)
def test_another_program_at_the_port_is_found(answer):
    with (
        answering(answer) as port,
        pytest.raises(InputError, match=f"MASTER_PORT = {port}: another program listens there"),
    ):
        opened(port, 1)


def test_a_silent_program_at_the_port_is_waited_for_no_longer_than_allowed():
    begin = time.monotonic()
    with answering(None) as port, pytest.raises(PeerError, match=r"rank 0 of 2 did not arrive .* does not answer"):
        opened(port, 1, seconds=0.5)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(("has_agent", "who"), [(False, "rank 0 of 2"), (True, "torchrun's agent")])
def test_nobody_at_the_port_is_named(has_agent, who):
    with pytest.raises(PeerError, match=f"^{who} did not arrive at 127.0.0.1:.* within 0.3 s .Connection refused"):
        opened(a_port(), 1, seconds=0.3, has_agent=has_agent)
