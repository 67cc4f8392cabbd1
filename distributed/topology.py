"""Topology of the run, read from the environment that torchrun or another launcher sets. Imports no torch.

The only module of this package that reads the environment, besides `name_clash`.
"""

import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from distributed.errors import InputError
from distributed.host.cpu_quota import available_cpus
from distributed.host.kernel_variables import selects_kernels

_RESOLVE_SECONDS = 5.0
_MAX_PARENTS = 4  # between torchrun and its worker there may be a shell or a container runtime


@dataclass(frozen=True)
class Topology:
    """Rank, world size and node of this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launched: bool = False
    """Whether a launcher set the variables. A process group is then created even for a single rank."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the variables that the launcher set. Without any, return a single process.

        Raises:
            InputError: RANK, WORLD_SIZE or LOCAL_RANK is set without the others, or is not a number in range.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        present = {name: os.environ[name] for name in names if name in os.environ}
        if not present:
            return cls()
        if len(present) < len(names):
            missing = ", ".join(name for name in names if name not in present)
            raise InputError(
                f"environment: {', '.join(present)} set without {missing}; start with torchrun, or unset all of them"
            )
        try:
            rank, world_size, local_rank = (_integer(name) for name in names)
            local_world_size = _integer("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
            node_rank = next((_integer(name) for name in ("GROUP_RANK", "NODE_RANK") if name in os.environ), 0)
        except ValueError as error:
            raise InputError(
                f"environment: {error}: should be a whole number; start with torchrun, or unset it"
            ) from None
        if not 0 <= rank < world_size:
            raise _out_of_range(f"RANK = {rank}", f"at least 0 and less than WORLD_SIZE = {world_size}")
        if not 1 <= local_world_size <= world_size:
            raise _out_of_range(f"LOCAL_WORLD_SIZE = {local_world_size}", f"from 1 to WORLD_SIZE = {world_size}")
        if not 0 <= local_rank < local_world_size:
            raise _out_of_range(
                f"LOCAL_RANK = {local_rank}", f"at least 0 and less than LOCAL_WORLD_SIZE = {local_world_size}"
            )
        return cls(rank, world_size, local_rank, local_world_size, node_rank, launched=True)

    def check_endpoint(self, *, patience_seconds: float | None = None) -> None:
        """Raise InputError if a launcher set RANK but no rendezvous endpoint, or if the endpoint's host does not resolve."""
        if not self.launched:
            return
        endpoint = rendezvous_endpoint()
        deadline = time.monotonic() + (_RESOLVE_SECONDS if patience_seconds is None else patience_seconds)
        while True:
            try:
                socket.getaddrinfo(endpoint.host, endpoint.port)
                return
            except (OSError, UnicodeError) as error:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"environment: MASTER_ADDR = {endpoint.host!r}: {getattr(error, 'strerror', None) or error}; name "
                        "the host of rank 0, or its IP address"
                    ) from None
            time.sleep(0.5)  # host names of a cluster may take a moment to resolve

    @property
    def has_waiting_peers(self) -> bool:
        """Whether other ranks would keep waiting if this one exited. A single torchrun ends all its ranks itself."""
        if self.world_size == 1:
            return False
        try:
            self.check_endpoint(patience_seconds=0)
            return self.launched and not (rendezvous_endpoint().has_agent and self.local_world_size == self.world_size)
        except InputError:
            return False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints to the terminal."""
        return self.rank == 0

    def threads(self, configured: int) -> int:
        """Return the number of CPU threads: as configured, or for 0 an equal share of the node's available CPUs.

        Decided here because torchrun and Ray set OMP_NUM_THREADS=1 on any machine.
        """
        return configured or max(1, available_cpus() // self.local_world_size)


class Endpoint(NamedTuple):
    """Where the ranks of an attempt rendezvous."""

    host: str
    port: int
    has_agent: bool
    """Whether torchrun's agent listens there, instead of rank 0."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def rendezvous_endpoint() -> Endpoint:
    """Return the endpoint that the launcher set.

    Raises:
        InputError: MASTER_ADDR or MASTER_PORT is missing or invalid.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (address and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise InputError(
            f"environment: MASTER_ADDR = {address!r} and MASTER_PORT = {port!r} are not a host and a port; start with "
            "torchrun"
        )
    return Endpoint(address, int(port), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


# Launchers


class Torchrun(NamedTuple):
    """A torchrun process that started this one."""

    pid: int
    arguments: list[str]


def find_torchrun() -> Torchrun | None:
    """Return the torchrun among this process's parents, or None."""
    pid = os.getppid()
    for _ in range(_MAX_PARENTS):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
            parent = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return None
        for index, word in enumerate(command[:6]):
            is_module = word == "torch.distributed.run" and command[index - 1] == "-m"
            if is_module or Path(word).name == "torchrun" or word.endswith("torch/distributed/run.py"):
                return Torchrun(pid, command[index + 1 :])
        pid = parent
    return None


def elastic_run_id() -> str:
    """Return torchrun's --rdzv-id if its workers share a store with it; otherwise an empty string."""
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RUN_ID", "") if is_shared else ""


def tasks_of_step() -> int:
    """Return the number of tasks that srun started together with this process; 1 in an interactive shell of srun."""
    if "SLURM_PTY_PORT" in os.environ:
        return 1
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdecimal() else 1


def is_elastic() -> bool:
    """Whether torchrun was given a rendezvous endpoint. Nodes can join such a job later."""
    torchrun = find_torchrun() if elastic_run_id() else None
    options = ("--rdzv-endpoint", "--rdzv_endpoint")
    return torchrun is not None and any(word.startswith(options) for word in torchrun.arguments)


def has_launcher() -> bool:
    """Whether the parent is torchrun or a Slurm step, whose death ends the job. A shell's death need not."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ


def is_first_on_node() -> bool:
    """Whether this rank prints for all ranks of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def error_file() -> Path | None:
    """Return the file from which torchrun reads why this rank failed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


class SlurmJob(NamedTuple):
    """Id of a Slurm job, its number of restarts, and its cluster."""

    job: str
    restarts: int
    cluster: str


def slurm_job() -> SlurmJob | None:
    """Return the Slurm job of this process, or None."""
    if not (job := os.environ.get("SLURM_JOB_ID", "")):
        return None
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return SlurmJob(job, int(restarts) if restarts.isdecimal() else 0, os.environ.get("SLURM_CLUSTER_NAME", ""))


def cluster_job() -> str:
    """Describe the cluster job of this process, for messages; empty in an interactive shell, e.g. of salloc."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # set by `ray job submit`
        return "a Ray job"
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"Slurm job {job}" if job and not (sys.stderr and sys.stderr.isatty()) else ""


# The host


def kernel_variables() -> dict[str, str]:
    """Return the environment variables that select numerical kernels, sorted by name."""
    return {name: value for name, value in sorted(os.environ.items()) if selects_kernels(name)}


def allocator_is_configured() -> bool:
    """Return whether the user has set how the C library's allocator behaves."""
    return "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    )


def _integer(name: str) -> int:
    """Read a variable as an integer. Stricter than int(), which accepts "1_0" and digits of any script."""
    text = os.environ[name]
    if not re.fullmatch("-?[0-9]{1,9}", text.strip()):
        raise ValueError(f"{name} = {text!r}")
    return int(text)


def _out_of_range(setting: str, expected: str) -> InputError:
    return InputError(f"environment: {setting}: should be {expected}; start with torchrun")
