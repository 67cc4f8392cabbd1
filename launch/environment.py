"""Reads Slurm's and Ray's environment variables; no other module of `launch` does. Imports no torch."""

import os
import re
from dataclasses import dataclass
from typing import Self

from distributed.errors import InputError


@dataclass(frozen=True)
class Allocation:
    """The nodes of a Slurm job and their resources."""

    job: int
    nodes: int
    cpus: int
    """CPUs of the node with the fewest."""
    gpus: int
    """GPUs of the node that runs the batch script."""
    ranks: int
    """Processes per node: RANKS_PER_NODE, else one per GPU, else one."""
    array_task: int | None
    max_requeues: int
    node_list: str = ""
    """Node names in Slurm's compact notation, e.g. `n[1-4]`."""
    missing_folder: str = ""
    """The folder that the job was submitted from, if this node does not have it, so that the job started elsewhere."""

    @classmethod
    def from_environment(cls) -> Self:
        """Read the allocation of this job.

        Raises:
            InputError: this is not a job, or a variable is not a number.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise InputError(
                "environment: SLURM_JOB_ID is not set; run this in a Slurm job: sbatch slurm/train.sh CONFIG"
            )
        gpus, ranks = _number("SLURM_GPUS_ON_NODE", 0), ranks_per_node()
        if gpus > 1 and not ranks and os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
            raise InputError(
                f"environment: SLURM_GPUS_ON_NODE = {gpus}, of MIG slices: CUDA shows a process only the first, which all "
                "would share; request one slice per node, or complete GPUs"
            )
        return cls(
            job=_number("SLURM_JOB_ID", 0),
            nodes=_number("SLURM_JOB_NUM_NODES", 1, minimum=1),
            cpus=fewest_cpus(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")),
            gpus=gpus,
            ranks=ranks or gpus or 1,
            array_task=_number("SLURM_ARRAY_TASK_ID", 0) if os.environ.get("SLURM_ARRAY_TASK_ID") else None,
            max_requeues=_number("MAX_REQUEUES", 20),
            node_list=os.environ.get("SLURM_JOB_NODELIST", ""),
            missing_folder=os.environ.get("JOB_FOLDER_MISSING", ""),
        )


@dataclass(frozen=True)
class StepNode:
    """The node of this process within its job step."""

    index: int
    count: int
    name: str


def ranks_per_node() -> int:
    """Return RANKS_PER_NODE, or 0 if it is not set."""
    return _number("RANKS_PER_NODE", 0, minimum=1) if os.environ.get("RANKS_PER_NODE") else 0


def in_job() -> bool:
    """Whether this process runs in a Slurm job with nodes."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NUM_NODES" in os.environ


def step_node() -> StepNode:
    """Return this node's index in the job step, the number of nodes, and its name; outside a step, the only node."""
    name = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return StepNode(0, 1, name)
    return StepNode(_number("SLURM_PROCID", 0), _number("SLURM_NTASKS", 1, minimum=1), name)


def names_environment() -> bool:
    """Whether the user named an environment for the batch scripts to activate."""
    return any(os.environ.get(name) for name in ("VENV", "CONDA_ENV", "CONTAINER"))


def ray_address() -> str:
    """Return the address of the Ray cluster to join; empty if none is set."""
    return os.environ.get("RAY_ADDRESS", "")


def fewest_cpus(cpus_per_node: str) -> int:
    """Return the smallest count in Slurm's notation, e.g. 2 for `4(x2),2`."""
    counts = [int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", cpus_per_node)]
    return min(counts, default=1)


def _number(name: str, default: int, *, minimum: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdecimal() or len(text) > 10 or int(text) < minimum:
        raise InputError(
            f"environment: {name} = {text[:80]!r}: should be a whole number of at least {minimum}; correct or unset it"
        )
    return int(text)
