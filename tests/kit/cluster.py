"""A real Slurm of two nodes on this machine, with its own munge key, ports, addresses and folders; killed by pid."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kit.commands import ROOT, kill
from kit.hosts import Hosts, hosts_unavailable
from kit.speed import slowness

_NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
_CONF = """\
ClusterName=test
SlurmctldHost={machine_name}({machine})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=10
MpiDefault=none
{nodes}
PartitionName=test Nodes=n1,n2 Default=YES DefaultTime=60 State=UP OverSubscribe=NO
"""
_CPUS = 8  # per node; more than this machine has, so that several jobs fit on one


def slurm_unavailable() -> str | None:
    """Return why no Slurm can be started on this machine; None if it can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in _NEEDED if shutil.which(program, path=path) is None]
    return f"{', '.join(missing)} not installed (slurm-wlm, munge)" if missing else hosts_unavailable()


class Cluster:
    """Nodes n1 and n2, each a host of its own. Context manager; leaving it ends every daemon and job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = Hosts(2)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            **({"VENV": sys.prefix} if Path(sys.prefix, "bin/activate").is_file() else {}),
        }

    def __enter__(self) -> "Cluster":
        self.hosts.__enter__()
        try:
            self._write_conf()
            key = self.folder / "munge.key"
            key.write_bytes(secrets.token_bytes(1024))
            key.chmod(0o400)
            files = {"key-file": key} | {
                f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("pid", "seed", "log")
            }
            self._start("munged", ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                                   *[f"--{name}={path}" for name, path in files.items()]])  # fmt: skip
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in self.hosts.names:
                self.start_node(node)
            wait_for(self.is_idle, seconds=30, description="2 idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _write_conf(self) -> None:
        ports = free_ports(3)
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={self.hosts.address(node)} Port={port} CPUs={_CPUS} "
            f"CoresPerSocket={_CPUS} RealMemory=1000"
            for node, port in zip(self.hosts.names, ports[1:], strict=True)
        ]
        (self.folder / "slurm.conf").write_text(
            _CONF.format(folder=self.folder, machine_name=socket.gethostname().partition(".")[0],
                         machine=self.hosts.machine, port=ports[0], nodes="\n".join(nodes))
        )  # fmt: skip
        (self.folder / "state").mkdir()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=self.folder
            )

    def is_idle(self) -> bool:
        """Whether both nodes are up and have no job."""
        return self.run("sinfo", "-h", "-o", "%T %D").strip() == "idle 2"

    def start_node(self, node: str) -> None:
        """Start slurmd on a node, or restart it after `kill_node`."""
        self._start(node, self.hosts.on(node, ["slurmd", "-D", "-N", node]))

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd with SIGKILL: Slurm loses the node, but the processes of its jobs live on."""
        kill(self._daemons[node].pid)
        self._daemons.pop(node).wait()

    def node_pid(self, node: str) -> int:
        return self._daemons[node].pid

    def run(self, *command: object, fails: bool = False, cwd: Path = ROOT, **environment: str) -> str:
        """Run a command on the machine with access to Slurm, and return its stdout; if it should fail, stderr as well."""
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, timeout=60,
                              env=self._environment | environment)  # fmt: skip
        assert (done.returncode != 0) == fails, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr if fails else done.stdout

    def sbatch(self, *arguments: object, cwd: Path = ROOT, **environment: str) -> str:
        """Submit a job, and return its number."""
        printed = self.run("sbatch", "--parsable", *map(str, arguments), cwd=cwd, **environment)
        return printed.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        printed = self.run("scontrol", "show", "job", number)
        fields = dict(re.findall(r"(\w+)=(\S*)", printed))
        if comment := re.search(r"^ *Comment=(.*)$", printed, re.M):
            fields["Comment"] = comment[1].strip()
        return fields

    def wait_for_state(self, number: str, *states: str, seconds: float = 90) -> str:
        """Wait until the job is in one of these states, and return it."""

        def arrived() -> bool:
            return self.job(number)["JobState"] in states

        wait_for(arrived, seconds=seconds, description=lambda: f"job {number} in {states}; it is {self.job(number)}")
        return self.job(number)["JobState"]

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user", "root"], env=self._environment, capture_output=True, check=False)
        for name in ("n1", "n2", "slurmctld", "munged"):
            if daemon := self._daemons.pop(name, None):
                kill(daemon.pid)
                daemon.wait()
        self.hosts.__exit__()  # ends whatever still runs on the nodes


def free_ports(count: int) -> list[int]:
    """Return ports that are free now."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], bool], *, seconds: float, description: str | Callable[[], str]) -> None:
    """Poll until the condition holds; fail after `seconds`, more on a slow machine."""
    deadline = time.monotonic() + seconds * slowness()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not in {seconds} s: {description if isinstance(description, str) else description()}"
            )
        time.sleep(0.2)
