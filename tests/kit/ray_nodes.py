"""A real Ray cluster of several nodes on this machine, each a `ray start` of its own; ended by pid, never by `ray stop`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from kit.cluster import free_ports, wait_for
from kit.commands import ROOT, Command, kill

_TOKEN = "0" * 32
_RAY = str(Path(sys.executable).with_name("ray"))


class RayCluster:
    """A head without CPUs for workers, and nodes that come and go. A context; its end ends every process and file of it."""

    def __enter__(self) -> "RayCluster":
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path must be short
        port, client, dashboard = free_ports(3)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        (self.folder / "token").write_text(_TOKEN)
        self.environment = {
            "PATH": f"{Path(_RAY).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
            "RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard,
            # A node that was killed is given up after seconds.
            "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4",
        }  # fmt: skip
        self._nodes: dict[str, Command] = {}
        self._drained: set[str] = set()
        try:
            self._start("head", "--head", f"--port={port}", f"--ray-client-server-port={client}",
                        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder / 't'}",
                        cpus=0)  # fmt: skip
            wait_for(self._is_up, seconds=60, what=lambda: self._nodes["head"].text)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name: str, *options: str, cpus: int, hidden: Path | None = None) -> None:
        blind = (
            []
            if hidden is None
            else ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none '{hidden}' && exec \"$@\"", "sh"]
        )
        command = [*blind, _RAY, "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}", "--num-gpus=0",
                   "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={100 * 2**20}", *options]  # fmt: skip
        self._nodes[name] = Command(command, output=self.folder / f"{name}.out", more=self.environment)

    def _is_up(self) -> bool:
        try:
            return self.count() > 0
        except OSError:
            return False

    def have(self, *names: str) -> None:
        """Exactly these nodes beside the head, with one CPU each; those that are there stay."""
        for name in (self._nodes.keys() - {"head", *names}) | self._drained:
            self.kill(name)
        for name in names:
            if name not in self._nodes:
                self.add(name)
        wait_for(lambda: self.count() == 1 + len(names), seconds=60, what=lambda: str(self.nodes()))

    def add(self, name: str, *, cpus: int = 1, hidden: Path | None = None, wait: bool = True) -> None:
        """A node more, with a label of its name; it has a folder of its own where the others have `hidden`.

        Args:
            wait: until it has joined.
        """
        # The head's monitor reads the logs of all nodes of this machine; a second one would tell each line twice.
        self._start(
            name,
            f"--address={self.address}",
            f"--labels=name={name}",
            "--include-log-monitor=false",
            cpus=cpus,
            hidden=hidden,
        )
        if wait:
            wait_for(lambda: self.node_id(name) != "", seconds=60, what=lambda: self._nodes[name].text)

    def count(self) -> int:
        """Nodes that are alive, the head among them."""
        return sum(node["state"] == "ALIVE" for node in self.nodes())

    def nodes(self) -> list[dict[str, Any]]:
        """What the dashboard says of each node; `ray list nodes` asks the same, and takes seconds to start."""
        asked = urllib.request.Request(
            f"{self.dashboard}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {_TOKEN}"}
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return list(json.load(answer)["data"]["result"]["result"])

    def node_id(self, name: str) -> str:
        """Of the node of that name; "" where it is not alive."""
        alive = [node for node in self.nodes() if node["state"] == "ALIVE"]
        return next((str(node["node_id"]) for node in alive if node["labels"].get("name") == name), "")

    def is_used(self, name: str) -> bool:
        """Whether a worker runs there."""
        return any("RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text() for pid in self._nodes[name].ranks())

    def kill(self, name: str) -> None:
        """kill -9 of all processes of the node, workers too."""
        self._drained.discard(name)
        self._nodes.pop(name).__exit__()

    def drain(self, name: str, *, seconds: int = 60) -> None:
        """Tell the cluster that the node is going to be taken away."""
        self._drained.add(name)
        self.ask("drain-node", f"--address={self.address}", f"--node-id={self.node_id(name)}", "--reason-message=test",
                 "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--deadline-remaining-seconds={seconds}")  # fmt: skip

    def ask(self, *words: object, fails: bool = False) -> str:
        """What `ray WORDS` says."""
        done = subprocess.run([_RAY, *map(str, words)], env=os.environ | self.environment, cwd=ROOT, capture_output=True,
                              text=True, timeout=240, check=False)  # fmt: skip
        assert (done.returncode != 0) == fails, f"ray {words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if fails else "")

    def train(self, *words: object, output: Path, more: dict[str, str] | None = None) -> Command:
        """`python -m launch.ray_train WORDS` on this cluster."""
        command = [sys.executable, "-m", "launch.ray_train", *map(str, words)]
        return Command(command, output=output, more=self.environment | (more or {}))

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._nodes)):
            node = self._nodes.pop(name)
            kill(*node.ranks(), node.process.pid)
            node.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)
