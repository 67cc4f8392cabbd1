"""`python -m launch.doctor [CONFIG.toml] [--SETTING VALUE ...]`: go, or no go and which node is bad; alone or in a Slurm job.

Each node of the job runs `launch.doctor.probe`, in parallel; the reports come back through srun, not over the network that is
being tried. A node that does not answer is asked again alone, and Slurm is asked for its state. Options: --address and
--port where nodes meet, --seconds to wait, --gpus a node, --free-gib of disk.
"""

import argparse
import math
import re
import uuid
from pathlib import Path

from distributed.config import from_command_line
from distributed.errors import ExitCode, InputError
from distributed.process.streams import run_command
from launch.address import free_port, reachable
from launch.doctor.diagnosis import table, wrong
from launch.doctor.reports import bounded, of_nodes, of_this_machine
from launch.environment import Allocation, in_job, place


def main() -> int:
    """0: go; 1: no go; 2: bad input."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=__doc__)
    parser.add_argument("--address", default="", help="where nodes meet; the first node's if not given")
    parser.add_argument("--port", type=int, default=0, help="from the job's number if not given")
    parser.add_argument("--seconds", type=float, default=20.0, help="wait for all nodes")
    parser.add_argument(
        "--gpus", type=int, default=0, help="that each node should have; as many as the others if not given"
    )
    parser.add_argument("--free-gib", type=float, default=1.0, help="that the disk of the run folder should have")
    given, words = parser.parse_known_args()
    try:
        if not (math.isfinite(given.seconds) and 0 < given.seconds <= 3600):
            raise InputError(f"command line: --seconds {given.seconds:g}: should be above 0, at most 3600")
        if not 0 <= given.port < 2**16:
            raise InputError(f"command line: --port {given.port}: should be from 1 to 65535")
        run_dir = from_command_line(words).config.run_dir
        if in_job():
            allocation = Allocation.from_environment()
            expected = _nodes(allocation)
            address = reachable(given.address or _address_of(expected[0]), nodes=len(expected))
            port, gpus = given.port or free_port(allocation.job), given.gpus or allocation.gpus
        else:
            expected, address, port, gpus = [place()[2]], "127.0.0.1", given.port or free_port(0), given.gpus
        token = _lay_token(run_dir)
        words = ["--address", address, "--port", str(port), "--token", token, "--seconds", str(given.seconds), *words]
        try:
            if in_job():
                answers = of_nodes(words, expected, seconds=given.seconds)
            else:
                answers = of_this_machine(words, expected[0], seconds=given.seconds)
        finally:
            for file in run_dir.glob(f"{token}*"):
                file.unlink(missing_ok=True)
        states = _states(allocation.node_list) if in_job() else {}
    except InputError as error:
        error.report()
        return ExitCode.BAD_INPUT
    silent = answers.silent
    if in_job():
        silent = {node: f"{why}; Slurm has it as {states.get(node, 'unknown')}" for node, why in silent.items()}
    reports = list(answers.reports.values())
    failures = wrong(reports, expected, token=len(expected) > 1, gpus=gpus, free_gib=given.free_gib, silent=silent)
    print(table(reports))
    for node, state in states.items():
        if "DRAIN" in state:
            print(f"note: {node} is draining ({state}): it keeps this job, and gets no new one")
    for line in failures:
        print(f"no go: {line}")
    if not failures:
        print(f"go: {len(reports)} node{'s' if len(reports) > 1 else ''}")
    return ExitCode.FAILED if failures else ExitCode.FINISHED


def _lay_token(run_dir: Path) -> str:
    """Write a file into the run folder that every node should see."""
    token = f".doctor-{uuid.uuid4().hex[:12]}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / token).write_text("")
    except OSError as error:
        raise InputError(f"run_dir = {run_dir}: {error.strerror}; give another with --run_dir") from None
    return token


def _nodes(allocation: Allocation) -> list[str]:
    """The names of the job's nodes.

    Raises:
        InputError: they are not as many as the job has.
    """
    names = _ask("scontrol", "show", "hostnames", allocation.node_list).split() if allocation.node_list else []
    if len(names) != allocation.nodes:
        raise InputError(
            f"environment: SLURM_JOB_NUM_NODES = {allocation.nodes}, and SLURM_JOB_NODELIST has {', '.join(names) or 'none'}; "
            "run this inside the intended job, with the variables that Slurm set"
        )
    return names


def _ask(*command: str) -> str:
    printed, problem = bounded(command, 30)
    if problem:
        said = " ".join(printed.split())[:200]  # scontrol says on stdout that a node is unknown
        raise InputError(
            f"{' '.join(command)}: {said or problem}; start this on a node of the job, where Slurm answers"
        )
    return printed


def _address_of(node: str) -> str:
    told = _ask("scontrol", "-o", "show", "node", node).split()
    return next((word.partition("=")[2] for word in told if word.startswith("NodeAddr=")), "") or node


def _states(node_list: str) -> dict[str, str]:
    """What Slurm has of each node, e.g. `IDLE+DRAIN (disk errors)`, without those that it does not know."""
    told, _ = bounded(["scontrol", "-o", "show", "node", node_list], 30)
    found = {}
    for line in told.splitlines():
        name, state = (re.search(rf"\b{field}=(\S+)", line) for field in ("NodeName", "State"))
        reason = re.search(r"\bReason=(.*?)(?: \[|$)", line)
        if name and state:
            found[name[1]] = state[1] + (f" ({reason[1]})" if reason else "")
    return found


if __name__ == "__main__":
    run_command(main)
