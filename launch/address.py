"""Rendezvous address and port of a job. Imports no torch.

`python -m launch.address ADDRESS` prints this machine's own address and its network interface on the route to ADDRESS,
one per line.
"""

import fcntl
import ipaddress
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from distributed.errors import InputError

_FIRST_PORT, _PORTS = 15_000, 15_000  # below the ephemeral ports, which begin at 32768
_ATTEMPTS, _STRIDE = 100, 997
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")


class Route(NamedTuple):
    """This machine's end of the route to another one; empty strings if none was found."""

    address: str
    interface: str


def resolve_address(host: str, *, nodes: int) -> str:
    """Return the numeric address of a host name or address.

    Raises:
        InputError: it cannot be resolved, or it is a loopback address and there are several nodes.
    """
    remedy = (
        "fix NodeAddr in slurm.conf or the name in /etc/hosts, or give another: sbatch --export=ALL,RDZV_ADDRESS=..."
    )
    try:
        resolved = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise InputError(f"rendezvous address = {host!r}: {error}; {remedy}") from None
    routable = [address for address in resolved if not is_loopback(address)]
    if nodes > 1 and not routable:
        raise InputError(
            f"rendezvous address = {host}: resolves to {resolved[0]}, a loopback address, which the other nodes cannot "
            f"reach; {remedy}"
        )
    usable = routable or resolved
    return next((address for address in usable if "." in address), usable[0])


def is_loopback(host: str) -> bool:
    """Whether a numeric address is a loopback address."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(job: int) -> int:
    """Return a free port derived from the job's number, so that jobs with neighboring numbers use different ports.

    Raises:
        InputError: a hundred candidates are in use.
    """
    for attempt in range(_ATTEMPTS):
        port = _FIRST_PORT + (job + attempt * _STRIDE) % _PORTS
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like the store that will use the port
            try:
                candidate.bind(("", port))
            except OSError:
                continue
            return port
    raise InputError(
        f"ports {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1}: {_ATTEMPTS} were tried and all are in use; see ss -ltn"
    )


def local_route(address: str) -> Route:
    """Return this machine's own address and interface on the route to `address`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # on a datagram socket, this chooses the route and sends nothing
        except OSError:
            return Route("", "")
        own = str(probe.getsockname()[0])
        if family == socket.AF_INET6:
            return Route(own, _ipv6_interface(own))
        names = [name for _, name in socket.if_nameindex()]
        return Route(own, next((name for name in names if _interface_address(probe, name) == own), ""))


def _ipv6_interface(address: str) -> str:
    """Return the interface that has this IPv6 address, which the kernel lists in hexadecimal; empty if none has."""
    number = f"{int(ipaddress.IPv6Address(address.partition('%')[0])):032x}"
    with suppress(OSError):
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            if line.startswith(number):
                return line.split()[-1]
    return ""


def _interface_address(open_socket: socket.socket, interface: str) -> str:
    """Return the IPv4 address of an interface; empty if it has none."""
    request = struct.pack("256s", interface.encode()[:15])
    try:
        reply = fcntl.ioctl(open_socket.fileno(), _GET_ADDRESS, request)
    except OSError:
        return ""
    return socket.inet_ntoa(reply[20:24])


if __name__ == "__main__":
    print(*local_route(sys.argv[1]), sep="\n")
