"""The names of this machine."""

import socket
from pathlib import Path


def host() -> str:
    """Return the host name, for messages only: it need not be unique, and a container has its own."""
    return socket.gethostname()


def boot_id() -> str:
    """Return an id of the running operating system: unique to this machine, and the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or host()
    except OSError:
        return host()
