"""Who am I among how many: read from the environment that torchrun or another launcher sets. Imports no torch.

The only module that reads the environment.
"""

import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from distributed.errors import InputError
from distributed.host.cpu_quota import available_cpus

_RESOLVE_SECONDS = 5.0


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
            rank, world_size, local_rank = (_whole(name) for name in names)
            local_world_size = _whole("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
            node_rank = next((_whole(name) for name in ("GROUP_RANK", "NODE_RANK") if name in os.environ), 0)
        except ValueError as error:
            raise InputError(
                f"environment: {error}: should be a whole number; start with torchrun, or unset it"
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

    def check_meeting_place(self, *, patience_seconds: float | None = None) -> None:
        """Raises InputError if a launcher set RANK but no address to meet at, or that host does not resolve."""
        if not self.launched:
            return
        place = meeting_place()
        deadline = time.monotonic() + (_RESOLVE_SECONDS if patience_seconds is None else patience_seconds)
        while True:
            try:
                socket.getaddrinfo(place.host, place.port)
                return
            except (OSError, UnicodeError) as error:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"environment: MASTER_ADDR = {place.host!r}: {getattr(error, 'strerror', None) or error}; name the "
                        "host of rank 0, or its IP address"
                    ) from None
            time.sleep(0.5)  # a cluster's names may take a moment to be known

    @property
    def is_awaited(self) -> bool:
        """Whether other ranks would wait in vain if this one ended: those of a single torchrun are ended by it."""
        if self.world_size == 1:
            return False
        try:
            self.check_meeting_place(patience_seconds=0)
            return self.launched and not (meeting_place().has_agent and self.local_world_size == self.world_size)
        except InputError:
            return False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks on the terminal."""
        return self.rank == 0

    def threads(self, asked: int) -> int:
        """CPU threads for this rank: as asked, or its share of the CPU time that the node's ranks may have.

        torchrun and Ray set OMP_NUM_THREADS=1 whatever the machine has, so this must be decided here.
        """
        return asked or max(1, available_cpus() // self.local_world_size)


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


def is_elastic() -> bool:
    """Whether torchrun started this process for several nodes, some of which may join later."""
    found = torchrun_above() if elastic_run_id() else None
    return found is not None and any(word.startswith(("--rdzv-endpoint", "--rdzv_endpoint")) for word in found[1])


class MeetingPlace(NamedTuple):
    """Where the ranks of an attempt find each other."""

    host: str
    port: int
    has_agent: bool
    """Whether torchrun's agent listens there, instead of rank 0."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def meeting_place() -> MeetingPlace:
    """Where the launcher wants its ranks to meet.

    Raises:
        InputError: MASTER_ADDR or MASTER_PORT is not set, or no host and port.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (address and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise InputError(
            f"environment: MASTER_ADDR = {address!r} and MASTER_PORT = {port!r} name no host and port to meet at; start "
            "with torchrun"
        )
    return MeetingPlace(address, int(port), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def has_launcher() -> bool:
    """Whether the parent is torchrun or a Slurm step, whose death is the end of the job; a shell may go and leave it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ


def is_first_on_node() -> bool:
    """Whether this rank speaks for those of its node on the terminal."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def error_file() -> Path | None:
    """The file in which torchrun looks for the reason of this rank's failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def _whole(name: str) -> int:
    """An environment variable as a number; int() would take "1_0" and digits of any script."""
    text = os.environ[name]
    if not re.fullmatch("-?[0-9]{1,9}", text.strip()):
        raise ValueError(f"{name} = {text!r}")
    return int(text)


def host() -> str:
    """The name of this machine, for people to read: several may have one, and a container has its own."""
    return socket.gethostname()


def cluster_job() -> str:
    """The cluster's job that this process belongs to, for messages; empty at a person's terminal, e.g. in a shell of salloc."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # set for what `ray job submit` starts
        return "a Ray job"
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"Slurm job {job}" if job and not (sys.stderr and sys.stderr.isatty()) else ""


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
