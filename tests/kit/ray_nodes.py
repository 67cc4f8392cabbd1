"""A real Ray cluster of several nodes on this machine, one `ray start` per node; killed by pid, never by `ray stop`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

from kit.cluster import free_ports, wait_for
from kit.commands import ROOT, Command, kill

_TOKEN = "0" * 32
_RAY = Path(sys.executable).with_name("ray")


class RayCluster:
    """A head without CPUs for workers, and nodes that come and go. Context manager; leaving it removes processes and files."""

    def __init__(self, ray: Path = _RAY, **environment: str) -> None:
        """Take the program `ray` of an environment, and further variables for all nodes."""
        self._ray, self._more = str(ray), environment

    def __enter__(self) -> "RayCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path must be short
        port, client, dashboard, agent = free_ports(4)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        (self.folder / "token").write_text(_TOKEN)
        self.environment = {
            "PATH": f"{_RAY.parent}:{os.environ['PATH']}", **self._more, "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
            "RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard,
            # The cluster notices a killed node within seconds.
            "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4",
        }  # fmt: skip
        self._nodes: dict[str, Command] = {}
        self._drained: set[str] = set()
        try:
            self._start("head", "--head", f"--port={port}", f"--ray-client-server-port={client}",
                        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder / 't'}",
                        # The default port may belong to another cluster's agent: then no job could be submitted.
                        f"--dashboard-agent-listen-port={agent}", cpus=0)  # fmt: skip
            wait_for(partial(self._is_up, agent), seconds=60, description=lambda: self._nodes["head"].text)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name: str, *options: str, cpus: int, hidden: Path | None = None) -> None:
        hide = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none '{hidden}' && exec \"$@\"", "sh"]
        command = [self._ray, "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}", "--num-gpus=0",
                   "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={100 * 2**20}", *options]  # fmt: skip
        self._nodes[name] = Command(
            [*(hide if hidden else []), *command], output=self.folder / f"{name}.out", more=self.environment
        )

    def _is_up(self, agent: int) -> bool:
        """Whether the head has joined, and its agent, which starts submitted jobs, listens."""
        try:
            socket.create_connection(("127.0.0.1", agent), timeout=10).close()
            return self.count() > 0
        except OSError:
            return False

    def set_nodes(self, *names: str) -> None:
        """Add and kill nodes until there are exactly these beside the head, with one CPU each."""
        for name in (self._nodes.keys() - {"head", *names}) | self._drained:
            self.kill(name)
        for name in names:
            if name not in self._nodes:
                self.add(name)
        wait_for(lambda: self.count() == 1 + len(names), seconds=60, description=lambda: str(self.nodes()))

    def add(self, name: str, *, cpus: int = 1, hidden: Path | None = None, wait: bool = True) -> None:
        """Start a node, with its name as a label.

        Args:
            hidden: a folder that the node does not share with the others.
            wait: whether to wait until it has joined.
        """
        # The head's monitor reads the logs of all nodes on this machine; a second one would repeat each line.
        self._start(
            name,
            f"--address={self.address}",
            f"--labels=name={name}",
            "--include-log-monitor=false",
            cpus=cpus,
            hidden=hidden,
        )
        if wait:
            wait_for(lambda: self.node_id(name) != "", seconds=60, description=lambda: self._nodes[name].text)

    def count(self) -> int:
        """Return the number of nodes that are alive, including the head."""
        return sum(node["state"] == "ALIVE" for node in self.nodes())

    def nodes(self) -> list[dict[str, Any]]:
        """Return the dashboard's entry of each node; `ray list nodes` shows the same but takes seconds to start."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {_TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return list(json.load(answer)["data"]["result"]["result"])

    def node_id(self, name: str) -> str:
        """Return the id of a node by its name; empty if it is not alive."""
        alive = [node for node in self.nodes() if node["state"] == "ALIVE"]
        return next((str(node["node_id"]) for node in alive if node["labels"].get("name") == name), "")

    def is_used(self, name: str) -> bool:
        """Whether a worker runs on the node."""
        return any("RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text() for pid in self._nodes[name].ranks())

    def kill(self, name: str) -> None:
        """Kill all processes of the node with SIGKILL, including workers."""
        self._drained.discard(name)
        self._nodes.pop(name).__exit__()

    def drain(self, name: str, *, seconds: int = 60) -> None:
        """Announce to the cluster that the node will be taken away."""
        self._drained.add(name)
        self.run("drain-node", f"--address={self.address}", f"--node-id={self.node_id(name)}", "--reason-message=test",
                 "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--deadline-remaining-seconds={seconds}")  # fmt: skip

    def run(self, *arguments: object, fails: bool = False) -> str:
        """Run `ray ARGUMENTS`, and return its stdout; if it should fail, stderr as well."""
        done = subprocess.run([self._ray, *map(str, arguments)], env=os.environ | self.environment, cwd=ROOT, text=True,
                              capture_output=True, timeout=240, check=False)  # fmt: skip
        assert (done.returncode != 0) == fails, f"ray {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if fails else "")

    def train(self, *arguments: object, output: Path, cwd: Path = ROOT) -> Command:
        """Start `python -m launch.ray_train ARGUMENTS` on this cluster."""
        command = [sys.executable, "-m", "launch.ray_train", *map(str, arguments)]
        return Command(command, output=output, cwd=cwd, more=self.environment)

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._nodes)):
            node = self._nodes.pop(name)
            kill(*node.ranks(), node.process.pid)
            node.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)
