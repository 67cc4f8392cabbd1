"""Connecting to the other ranks: a server that dies at the last moment is reported as such."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from distributed.comm import peers
from distributed.comm.tcp_store import OpenStore
from distributed.errors import PeerError
from distributed.topology import Topology


def test_rank_0_that_dies_once_all_have_arrived_is_reported(monkeypatch):
    servers = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    port = servers[0].port
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))

    def open_store(*_, **__):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.setblocking(False)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
        return OpenStore(store, connection)

    def agree_on_token(*_, **__):
        servers.clear()  # rank 0 dies
        return "token"

    monkeypatch.setattr(peers, "open_store", open_store)
    monkeypatch.setattr(peers, "agree_on_token", agree_on_token)
    topology = Topology(rank=1, world_size=2, local_rank=1, local_world_size=2, launched=True)
    with pytest.raises(PeerError, match=r"closed before all 2 ranks had arrived"):
        peers.Peers.connect(topology, timeout_seconds=2)
