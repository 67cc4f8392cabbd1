"""`python -m launch.doctor [CONFIG.toml] [--SETTING VALUE ...]`: checks this machine, or every node of a Slurm job.

Prints a table and `go`, or `no go` with the bad node and the remedy. Each node runs `launch.doctor.probe`, in parallel; the
reports come back through srun instead of over the network under test. A node that does not answer is retried alone.
"""

import argparse
import math
from pathlib import Path

from distributed.config import from_command_line
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.process.arguments import OneLineParser
from distributed.process.streams import run_command
from launch.address import free_port, resolve_address
from launch.doctor.collect import report_of_this_machine, reports_of_job
from launch.doctor.diagnosis import diagnose, notes, table
from launch.doctor.reports import Answers
from launch.doctor.slurm_nodes import job_nodes, node_address, node_states
from launch.doctor.token import token_in
from launch.environment import Allocation, in_job, step_node


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options; every other argument is a setting."""
    options = OneLineParser(prog="python -m launch.doctor", description=__doc__)
    options.add_argument("--address", default="", help="rendezvous address; default: the first node's")
    options.add_argument("--port", type=int, default=0, help="rendezvous port; default: derived from the job's number")
    options.add_argument("--seconds", type=float, default=20.0, help="how long to wait for all nodes")
    options.add_argument("--gpus", type=int, default=0, help="GPUs per node; default: the job's, or most nodes'")
    options.add_argument(
        "--free-gib", type=float, default=1.0, help="free space that the run folder's disk should have"
    )
    return options


@prints_errors
def main() -> int:
    """Return the exit code: 0 for go, 1 for no go, 2 for bad input."""
    options, settings = parser().parse_known_args()
    _check_options(options)
    config = from_command_line(settings).config
    run_dir = config.run_dir
    if options.gpus and config.device == "cpu":
        raise InputError(f"command line: --gpus {options.gpus}: has no effect with device = cpu; remove it")
    expected, states, gpus = [step_node().name], dict[str, str](), options.gpus
    if in_job():
        allocation = Allocation.from_environment()
        expected, gpus = job_nodes(allocation), options.gpus or allocation.gpus
        answers = _examine_job(options, settings, run_dir, allocation.job, expected)
        states = node_states(allocation.node_list)
        for node, reason in answers.silent.items():
            answers.silent[node] = f"{reason}; its state in Slurm is {states.get(node, 'unknown')}"
    else:
        port = options.port or free_port(0)
        with token_in(run_dir, ".doctor") as token:
            arguments = _probe_arguments("127.0.0.1", port, token, options.seconds, settings)
            answers = report_of_this_machine(arguments, expected[0], seconds=options.seconds)
    reports = list(answers.reports.values())
    failures = diagnose(
        reports,
        expected,
        several=len(expected) > 1,
        gpus=None if config.device == "cpu" else gpus,
        free_gib=options.free_gib,
        silent=answers.silent,
    )
    print(table(reports))
    for node, state in states.items():
        if "DRAIN" in state:
            print(f"note: {node} is draining ({state}): it keeps this job and gets no new one")
    for line in notes(reports):
        print(f"note: {line}")
    for line in failures:
        print(f"no go: {line}")
    if not failures:
        print(f"go: {len(reports)} node{'s' if len(reports) > 1 else ''}")
    return ExitCode.FAILED if failures else ExitCode.FINISHED


def _check_options(options: argparse.Namespace) -> None:
    if not (math.isfinite(options.seconds) and 0 < options.seconds <= 3600):
        raise InputError(f"command line: --seconds {options.seconds:g}: should be above 0, at most 3600")
    if not 0 <= options.port < 2**16:
        raise InputError(f"command line: --port {options.port}: should be from 1 to 65535")


def _examine_job(
    options: argparse.Namespace, settings: list[str], run_dir: Path, job: int, nodes: list[str]
) -> Answers:
    address = resolve_address(options.address or node_address(nodes[0]), nodes=len(nodes))
    port = options.port or free_port(job)
    with token_in(run_dir, ".doctor") as token:
        arguments = _probe_arguments(address, port, token, options.seconds, settings)
        return reports_of_job(arguments, nodes, seconds=options.seconds)


def _probe_arguments(address: str, port: int, token: str, seconds: float, settings: list[str]) -> list[str]:
    return ["--address", address, "--port", str(port), "--token", token, "--seconds", str(seconds), *settings]


if __name__ == "__main__":
    run_command(main, starts_processes=True)
