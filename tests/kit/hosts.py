"""Several hosts on one machine: network namespaces with own addresses and names, on a bridge whose links can be cut."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence

from kit.commands import kill

_NEEDED = ("ip", "unshare", "nsenter")
# The kernel ends a namespace, and the link into it, some time after `ip netns del` has returned: no name is used twice.
_MADE = itertools.count(1)


def why_none() -> str | None:
    """Why this machine cannot make such hosts, in words; None where it can."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = f"dt-try-{os.getpid()}"
    asked = subprocess.run(["ip", "netns", "add", tried], capture_output=True, text=True, check=False)
    if asked.returncode:
        return f"network namespaces are not allowed here: {asked.stderr.strip()}"
    _ip("netns", "del", tried)
    return None


class Hosts:
    """Hosts n1, n2, ... with the addresses 10.X.Y.1, 10.X.Y.2; the machine itself is 10.X.Y.254. A context."""

    def __init__(self, count: int) -> None:
        number = os.getpid()
        self._bridge = f"dt{number}x{next(_MADE)}"
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
        """The command as it is to be started on that host: with its network, name, mounts and shared memory. One process."""
        # Not `ip netns exec`, which mounts another /sys, without the cgroups that slurmd looks for.
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", "unshare", "--uts", "--mount", "sh", "-c",
                'mount -t tmpfs tmpfs /dev/shm && hostname "$1" && shift && exec "$@"', "sh", host, *command]  # fmt: skip

    def cut(self, host: str) -> None:
        """Packets of the host go nowhere; nobody is told."""
        _ip("link", "set", self._link(host), "nomaster")

    def mend(self, host: str) -> None:
        _ip("link", "set", self._link(host), "master", self._bridge)

    def processes(self, host: str) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._space(host)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def lose(self, host: str) -> None:
        """The host is gone with all that ran on it, as when its power fails: its peers get no word."""
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


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
