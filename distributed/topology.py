"""Who am I among how many: read from the environment that torchrun or another launcher sets. Imports no torch.

The only module that reads the environment.
"""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distributed.cgroup import cpu_quota
from distributed.errors import InputError


@dataclass(frozen=True)
class Topology:
    """The place of this process among its peers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launched: bool = False
    """Whether a launcher set the place, so that a process group is made even for a single rank."""

    @classmethod
    def from_environment(cls) -> Self:
        """What the launcher set, or a single process where none did.

        Raises:
            InputError: RANK, WORLD_SIZE or LOCAL_RANK is set without the others, or is no number in range.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = {name: os.environ[name] for name in names if name in os.environ}
        if not given:
            return cls()
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in given)
            raise InputError(
                f"environment: {missing} is missing beside {', '.join(given)}; start with torchrun, or unset them"
            )
        try:
            rank, world_size, local_rank = (int(given[name]) for name in names)
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            node_rank = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
        except ValueError:
            raise InputError(
                f"environment: {given}: each must be a whole number; start with torchrun, or unset them"
            ) from None
        if not 0 <= rank < world_size:
            raise InputError(
                f"environment: RANK = {rank} is not from 0 to below WORLD_SIZE = {world_size}; start with torchrun"
            )
        if not 1 <= local_world_size <= world_size:
            raise InputError(
                f"environment: LOCAL_WORLD_SIZE = {local_world_size} is not from 1 to WORLD_SIZE = {world_size}; "
                "start with torchrun"
            )
        if not 0 <= local_rank < local_world_size:
            raise InputError(
                f"environment: LOCAL_RANK = {local_rank} is not from 0 to below LOCAL_WORLD_SIZE = {local_world_size}; "
                "start with torchrun"
            )
        return cls(rank, world_size, local_rank, local_world_size, node_rank, launched=True)

    def check_meeting_place(self) -> None:
        """Raises InputError where a launcher set a place among peers, but not where they meet."""
        address, port = meeting_place()
        if self.launched and not (address and port.isdecimal() and 0 < int(port[:6]) < 2**16):
            raise InputError(
                f"environment: MASTER_ADDR = {address!r} and MASTER_PORT = {port!r} name no host and port to meet at; start "
                "with torchrun"
            )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks on the terminal."""
        return self.rank == 0

    def threads(self, asked: int) -> int:
        """CPU threads for this rank: as asked, or its share of the CPU time that the node's ranks may have.

        torchrun and Ray set OMP_NUM_THREADS=1 whatever the machine has, so this must be decided here.
        """
        return asked or max(1, available_cpus() // self.local_world_size)


def usable_cpus() -> int:
    """CPUs that this process may run on, whatever part of their time it may have."""
    return len(os.sched_getaffinity(0))


def within_quota(cpus: int) -> int:
    """That many CPUs, or the quota of this process's control groups, rounded, if that is less; at least one."""
    quota = cpu_quota()
    return cpus if quota is None else min(cpus, max(1, int(quota + 0.5)))


def available_cpus() -> int:
    """CPUs whose time this process may have."""
    return within_quota(usable_cpus())


def quota_note() -> str:
    """What a quota makes of the number of CPUs, in words; empty if nothing."""
    if (available := available_cpus()) == usable_cpus():
        return ""
    return f"CPU quota {cpu_quota() or 0:g}: threads for {available} of {usable_cpus()} CPUs"


def meeting_place() -> tuple[str, str]:
    """Address and port at which the launcher says that the ranks meet."""
    return os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")


def elastic_run_id() -> str:
    """torchrun's --rdzv-id, if its workers use a store that it shares with them; else empty."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RUN_ID", "") if shared else ""


def slurm_job() -> dict[str, Any]:
    """Number, restarts and cluster of the Slurm job that this process is of; empty outside."""
    if not (job := os.environ.get("SLURM_JOB_ID", "")):
        return {}
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return {"job": job, "restarts": int(restarts) if restarts.isdecimal() else 0, "cluster": cluster}


def torchrun_above() -> tuple[int, list[str]] | None:
    """Process id and arguments of the torchrun that started this process; None if none did."""
    pid = os.getppid()
    for _ in range(_GENERATIONS):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
            parent = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return None
        for index, word in enumerate(words[:6]):
            module = word == "torch.distributed.run" and words[index - 1] == "-m"
            if module or Path(word).name == "torchrun" or word.endswith("torch/distributed/run.py"):
                return pid, words[index + 1 :]
        pid = parent
    return None


def host() -> str:
    """The name of this machine, for people to read: several may have one, and a container has its own."""
    return socket.gethostname()


def machine() -> str:
    """What tells this machine's running system from any other, the same in all of its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or host()
    except OSError:
        return host()


_GENERATIONS = 4  # between torchrun and its worker there may be a shell or a container's runtime
# What chooses kernels, or the order in which they sum, on a CPU or a GPU; not what only reports, caches or limits memory.
_KERNEL_VARIABLES = re.compile(
    r"ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_(?!VERBOSE|JIT_(PROFILE|DUMP)|PRIMITIVE_CACHE)\w+|"
    r"MKL_(CBWR\w*|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE|DYNAMIC|DOMAIN_NUM_THREADS|NUM_STRIPES|\w+_LAYER)|"
    r"OPENBLAS_(CORETYPE|NUM_THREADS)|BLIS_(ARCH_TYPE|MODEL_TYPE|\w+_NT|NUM_THREADS)|GLIBC_TUNABLES|"
    r"OMP_(THREAD_LIMIT|DYNAMIC|SCHEDULE)|"  # not OMP_NUM_THREADS: a launcher sets it, and we set the number of threads
    r"KMP_(DETERMINISTIC_REDUCTION|FORCE_REDUCTION|DYNAMIC_MODE|ALL_THREADS|DEVICE_THREAD_LIMIT|TEAMS_THREAD_LIMIT)|"
    r"TORCHINDUCTOR_(?!\w*(CACHE|COMPILE_THREADS|WORKER|DEBUG|TRACE|PROVENANCE))\w+|TORCHDYNAMO_DISABLE|TORCH_COMPILE_DISABLE|"
    r"NVIDIA_TF32_OVERRIDE|CUBLAS(LT)?_\w+|CUDNN_\w+|NCCL_(ALGO|PROTO|NCHANNELS_PER_NET_PEER|M(IN|AX)_NCHANNELS)|"
    r"TORCH_(BLAS|LINALG)_PREFER_\w+|TORCH_CUDNN_\w+|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|DISABLE_ADDMM_CUDA_LT|"
    r"PYTORCH_TUNABLEOP_(?!VERBOSE)\w+"
)


def kernel_variables() -> dict[str, str]:
    """The environment variables that are set and by which libraries choose kernels."""
    return {name: value for name, value in sorted(os.environ.items()) if _KERNEL_VARIABLES.fullmatch(name)}
