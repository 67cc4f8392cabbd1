"""Serving the ranks' store, connecting to it, and detecting other programs at its port."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from kit.other_program import other_program
from kit.speed import slowness
from torch.distributed import Store, TCPStore

from distributed.comm.tcp_store import _is_store, open_store
from distributed.errors import InputError, PeerError
from distributed.topology import Endpoint


def a_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def endpoint(port: int, *, has_agent: bool = False) -> Endpoint:
    return Endpoint("127.0.0.1", port, has_agent)


def opened(port: int, rank: int, *, seconds: float = 5, has_agent: bool = False) -> tuple[Store, socket.socket | None]:
    return open_store(endpoint(port, has_agent=has_agent), rank=rank, world_size=2, timeout=timedelta(seconds=seconds))


def test_handshake_matches_this_version_of_torch():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        assert _is_store(connection) is True


def test_client_may_start_before_rank_0_serves():
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


def test_rank_0_is_a_client_of_torchruns_agent():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store, connection = opened(server.port, 0, has_agent=True)
    server.set("key", "value")
    assert store.get("key") == b"value"
    assert connection is not None


def test_port_in_use_is_refused_with_a_remedy():
    with (
        other_program(None) as port,
        pytest.raises(InputError, match=f"MASTER_PORT = {port}: Address already in use.*--standalone"),
    ):
        opened(port, 0)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 4, b"x", b""]
)
def test_foreign_program_at_the_port_is_detected(answer):
    with (
        other_program(answer) as port,
        pytest.raises(InputError, match=f"MASTER_PORT = {port}: another program listens there"),
    ):
        opened(port, 1)


def test_silent_program_at_the_port_times_out():
    begin = time.monotonic()
    with other_program(None) as port, pytest.raises(PeerError, match=r"rank 0 of 2 did not arrive .* does not answer"):
        opened(port, 1, seconds=0.5)
    assert time.monotonic() - begin < 3 * slowness()


@pytest.mark.parametrize(("has_agent", "who"), [(False, "rank 0 of 2"), (True, "torchrun's agent")])
def test_missing_server_is_named(has_agent, who):
    with pytest.raises(PeerError, match=f"^{who} did not arrive at 127.0.0.1:.* within 0.3 s .Connection refused"):
        opened(a_port(), 1, seconds=0.3, has_agent=has_agent)


def test_a_rank_whose_agent_has_ended_does_not_wait_for_it(monkeypatch):
    """E.g. torchrun was killed while the rank started, before the rank knew its parent."""
    monkeypatch.setattr("distributed.comm.tcp_store._AGENT_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"torchrun's agent at 127\.0\.0\.1:.* has ended"):
        opened(a_port(), 0, seconds=60, has_agent=True)
    assert time.monotonic() - begin < 30
