"""Where the nodes of a job meet: the first node's address, and a port of the job's own. Imports no torch.

`python -m launch.address ADDRESS` prints, a line each, by which own address and interface this machine reaches that one.
"""

import fcntl
import ipaddress
import socket
import struct
import sys

from distributed.errors import InputError

_LOWEST_PORT, _PORTS = 15_000, 15_000  # below the ports that systems hand out by themselves, from 32768


def reachable(host: str, *, nodes: int) -> str:
    """The numeric address of a host name or address.

    Raises:
        InputError: it has none, or one of loopback where several nodes are to meet.
    """
    remedy = (
        "fix NodeAddr in slurm.conf or the name in /etc/hosts, or give another: sbatch --export=ALL,RDZV_ADDRESS=..."
    )
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise InputError(f"rendezvous address = {host!r}: {error}; {remedy}") from None
    outside = [one for one in found if not is_loopback(one)]
    if nodes > 1 and not outside:
        raise InputError(
            f"rendezvous address = {host}: leads to {found[0]}, loopback, where each of the {nodes} nodes meets only itself; "
            f"{remedy}"
        )
    usable = outside or found
    return next((one for one in usable if "." in one), usable[0])


def is_loopback(host: str) -> bool:
    """Whether a numeric address is one of loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(job: int) -> int:
    """A port from the job's number, the next candidate where somebody has it; jobs with neighbouring numbers never meet.

    Raises:
        InputError: a hundred candidates are taken.
    """
    for attempt in range(100):
        port = _LOWEST_PORT + (job + attempt * 997) % _PORTS
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store that is going to listen there
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise InputError(
        f"ports {_LOWEST_PORT} to {_LOWEST_PORT + _PORTS - 1}: a hundred were tried, all are taken; see ss -ltn"
    )


def way_to(address: str) -> tuple[str, str]:
    """The own address and interface by which this machine reaches an address; empty where there is no way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as tried:
        try:
            tried.connect((address, 9))  # of a datagram socket: chooses the way, sends nothing
            own = str(tried.getsockname()[0])
        except OSError:
            return "", ""
        names = [name for _, name in socket.if_nameindex()] if family == socket.AF_INET else []
        return own, next((name for name in names if _address_of(tried, name) == own), "")


def _address_of(asked: socket.socket, interface: str) -> str:
    get_address = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
    try:
        told = fcntl.ioctl(asked.fileno(), get_address, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return ""  # an interface without an address
    return socket.inet_ntoa(told[20:24])


if __name__ == "__main__":
    print(*way_to(sys.argv[1]), sep="\n")
