"""What Slurm gave to this job, and which Ray cluster is meant, read from the environment. The only module of `launch` that
reads it; imports no torch."""

import os
import re
from dataclasses import dataclass
from typing import Self

from distributed.errors import InputError


@dataclass(frozen=True)
class Allocation:
    """A job's nodes and what each of them has."""

    job: int
    nodes: int
    cpus: int
    """Of the node that was given the fewest."""
    gpus: int
    """Of the node that the batch script runs on."""
    ranks: int
    """Processes a node: RANKS_PER_NODE, else one a GPU, else one."""
    array_task: int | None
    restarts: int
    max_requeues: int
    node_list: str = ""
    """The nodes' names, as Slurm abbreviates them."""
    missing_folder: str = ""
    """The folder that the job was submitted from, if it is not there on this node, so that the job began elsewhere."""

    @classmethod
    def from_environment(cls) -> Self:
        """Raises InputError outside a job, or where a number that was set is none."""
        if "SLURM_JOB_ID" not in os.environ:
            raise InputError(
                "environment: SLURM_JOB_ID is not set; this runs inside a Slurm job: sbatch slurm/train.sh CONFIG"
            )
        gpus = _number("SLURM_GPUS_ON_NODE", 0)
        return cls(
            job=_number("SLURM_JOB_ID", 0),
            nodes=_number("SLURM_JOB_NUM_NODES", 1, least=1),
            cpus=fewest_cpus(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")),
            gpus=gpus,
            ranks=_number("RANKS_PER_NODE", gpus or 1, least=1),
            array_task=_number("SLURM_ARRAY_TASK_ID", 0) if os.environ.get("SLURM_ARRAY_TASK_ID") else None,
            restarts=_number("SLURM_RESTART_COUNT", 0),
            max_requeues=_number("MAX_REQUEUES", 20),
            node_list=os.environ.get("SLURM_JOB_NODELIST", ""),
            missing_folder=os.environ.get("JOB_FOLDER_MISSING", ""),
        )


def in_job() -> bool:
    """Whether this process runs in a Slurm job with nodes."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NUM_NODES" in os.environ


def place() -> tuple[int, int, str]:
    """Which node of the job's step this process stands for, among how many, and its name."""
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return 0, 1, node
    return _number("SLURM_PROCID", 0), _number("SLURM_NTASKS", 1, least=1), node


def names_environment() -> bool:
    """Whether the user names the environment that batch scripts activate."""
    return any(os.environ.get(name) for name in ("VENV", "CONDA_ENV", "CONTAINER"))


def ray_address() -> str:
    """Of the Ray cluster that is meant; empty where none is named."""
    return os.environ.get("RAY_ADDRESS", "")


def fewest_cpus(listed: str) -> int:
    """Of `4(x2),2`, as Slurm writes it: 2."""
    found = [int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", listed)]
    return min(found, default=1)


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise InputError(
            f"environment: {name} = {text[:80]!r}: should be a whole number of at least {least}; correct or unset it"
        )
    return int(text)
