"""Queries Slurm about the nodes of a job. Imports no torch."""

import re

from distributed.errors import InputError
from launch.doctor.bounded import run_bounded
from launch.environment import Allocation

_SECONDS = 30


def job_nodes(allocation: Allocation) -> list[str]:
    """Return the names of the job's nodes.

    Raises:
        InputError: their number differs from the job's, or Slurm does not answer.
    """
    names = _scontrol("show", "hostnames", allocation.node_list).split() if allocation.node_list else []
    if len(names) != allocation.nodes:
        raise InputError(
            f"environment: SLURM_JOB_NUM_NODES = {allocation.nodes}, but SLURM_JOB_NODELIST has {', '.join(names) or 'none'}; "
            "run this inside the intended job, with the variables that Slurm set"
        )
    return names


def node_address(node: str) -> str:
    """Return the NodeAddr of a node, or its name if it has none.

    Raises:
        InputError: Slurm does not answer.
    """
    fields = _scontrol("-o", "show", "node", node).split()
    return next((field.partition("=")[2] for field in fields if field.startswith("NodeAddr=")), "") or node


def node_states(node_list: str) -> dict[str, str]:
    """Return Slurm's state of each node that it knows, e.g. `IDLE+DRAIN (disk errors)`."""
    states = {}
    for line in run_bounded(["scontrol", "-o", "show", "node", node_list], _SECONDS).printed.splitlines():
        name, state = (re.search(rf"\b{field}=(\S+)", line) for field in ("NodeName", "State"))
        reason = re.search(r"\bReason=(.*?)(?: \[|$)", line)
        if name and state:
            states[name[1]] = state[1] + (f" ({reason[1]})" if reason else "")
    return states


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    printed, problem = run_bounded(command, _SECONDS)
    if problem:
        complaint = " ".join(printed.split())[:200]  # scontrol reports an unknown node on stdout
        raise InputError(
            f"{' '.join(command)}: {complaint or problem}; start this on a node of the job, where Slurm answers"
        )
    return printed
