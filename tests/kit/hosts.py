"""Several hosts on one machine: network namespaces with their own addresses and names, on a bridge whose links can be cut."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence

from kit.commands import kill

_NEEDED = ("ip", "unshare", "nsenter")
# The kernel removes a namespace and its link some time after `ip netns del` has returned, so no name is used twice.
_NUMBERS = itertools.count(1)


def hosts_unavailable() -> str | None:
    """Return why such hosts cannot be created here; None if they can."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"dt-try-{os.getpid()}"
    attempt = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if attempt.returncode:
        return f"network namespaces are not allowed here: {attempt.stderr.strip()}"
    _ip("netns", "del", name)
    return None


class Hosts:
    """Hosts n1, n2, ... with the addresses 10.X.Y.1, 10.X.Y.2; the machine itself is 10.X.Y.254. Context manager."""

    def __init__(self, count: int) -> None:
        number = os.getpid()
        self._bridge = f"dt{number}x{next(_NUMBERS)}"
        self._net = f"10.{200 + number // 256 % 50}.{number % 256}"
        self.names = [f"n{index + 1}" for index in range(count)]
        self.machine = f"{self._net}.254"

    def address(self, host: str) -> str:
        return f"{self._net}.{host.removeprefix('n')}"

    def __enter__(self) -> "Hosts":
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.machine}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for host in self.names:
                self._add(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, host: str) -> None:
        space, link = self._space(host), self._link(host)
        _ip("netns", "add", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a host, with its network, name, mounts and shared memory."""
        # Not `ip netns exec`: it mounts another /sys without the cgroups that slurmd looks for.
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", "unshare", "--uts", "--mount", "sh", "-c",
                'mount -t tmpfs tmpfs /dev/shm && hostname "$1" && shift && exec "$@"', "sh", host, *command]  # fmt: skip

    def cut(self, host: str) -> None:
        """Drop all packets of the host; nobody gets an error."""
        _ip("link", "set", self._link(host), "nomaster")

    def restore(self, host: str) -> None:
        """Undo `cut`."""
        _ip("link", "set", self._link(host), "master", self._bridge)

    def processes(self, host: str) -> list[int]:
        """Return the pids of all processes on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self._space(host)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def lose(self, host: str) -> None:
        """Simulate a power failure: all processes of the host are gone, and its peers get no packet about it."""
        self.cut(host)
        kill(*self.processes(host))

    def __exit__(self, *_: object) -> None:
        for host in self.names:
            kill(*self.processes(host))
            subprocess.run(["ip", "link", "del", self._link(host)], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", self._space(host)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def _space(self, host: str) -> str:
        return f"{self._bridge}-{host}"

    def _link(self, host: str) -> str:
        return f"{self._bridge}{host}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
