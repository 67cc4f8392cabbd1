import socket
from pathlib import Path

import pytest

from distributed.errors import InputError
from launch.address import free_port, local_route, resolve_address


def test_several_nodes_never_rendezvous_on_loopback():
    assert resolve_address("127.0.0.1", nodes=1) == "127.0.0.1"
    assert resolve_address("10.1.2.3", nodes=2) == "10.1.2.3"
    with pytest.raises(InputError, match=r"rendezvous address = localhost: resolves to .*, a loopback address"):
        resolve_address("localhost", nodes=2)
    with pytest.raises(InputError, match="rendezvous address"):
        resolve_address("no-such-host.invalid", nodes=2)


def test_the_local_route_names_address_and_interface():
    assert local_route("127.0.0.1") == ("127.0.0.1", "lo")
    if Path("/proc/net/if_inet6").is_file() and "lo" in Path("/proc/net/if_inet6").read_text():
        assert local_route("::1") == ("::1", "lo")


def test_a_port_in_use_is_skipped():
    with socket.socket() as listener:
        listener.bind(("", free_port(12_345)))
        listener.listen()
        assert free_port(12_345) != listener.getsockname()[1]
    assert free_port(12_345) != free_port(12_346)
