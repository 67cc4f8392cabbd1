"""`python -m launch.doctor [CONFIG.toml] [--SETTING VALUE ...]`: go, or no go and which node is bad; alone or in a Slurm job.

Each node of the job runs `launch.probe`, in parallel; the reports come back through srun, not over the network that is
being tried. Options: --address and --port where nodes meet, --seconds to wait, --gpus a node, --free-gib of disk.
"""

import argparse
import json
import subprocess
import sys
import uuid
from pathlib import Path

from distributed.config import load
from distributed.errors import ExitCode, InputError
from distributed.streams import run_command
from launch.address import free_port, reachable
from launch.allocation import Allocation, in_job, place
from launch.probe import MARK, Report
from launch.verdict import table, wrong


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
        run_dir = load(words)[0].run_dir
        if in_job():
            allocation = Allocation.from_environment()
            expected = _ask("scontrol", "show", "hostnames")
            address = reachable(given.address or _address_of(expected[0]), nodes=allocation.nodes)
            port, gpus = given.port or free_port(allocation.job), given.gpus or allocation.gpus
        else:
            expected, address, port, gpus = [place()[2]], "127.0.0.1", given.port or free_port(0), given.gpus
        with_token = len(expected) > 1
        token = _lay_token(run_dir)
        words = ["--address", address, "--port", str(port), "--token", token, "--seconds", str(given.seconds), *words]
        try:
            reports = _reports(words, nodes=len(expected), step=in_job(), seconds=given.seconds)
        finally:
            for file in run_dir.glob(f"{token}*"):
                file.unlink(missing_ok=True)
    except InputError as error:
        error.tell()
        return ExitCode.BAD_INPUT
    failures = wrong(reports, expected, token=with_token, gpus=gpus, free_gib=given.free_gib)
    print(table(reports))
    for line in failures:
        print(f"no go: {line}")
    if not failures:
        print(f"go: {len(reports)} node{'s' if len(reports) > 1 else ''}")
    return ExitCode.FAILED if failures else ExitCode.FINISHED


def _lay_token(run_dir: Path) -> str:
    """A file in the run folder that every node should see."""
    token = f".doctor-{uuid.uuid4().hex[:12]}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / token).write_text("")
    except OSError as error:
        raise InputError(f"run_dir = {run_dir}: {error.strerror}; give another with --run_dir") from None
    return token


def _reports(words: list[str], *, nodes: int, step: bool, seconds: float) -> list[Report]:
    """What the nodes found; one that does not answer in time has none."""
    command = [sys.executable, "-m", "launch.probe", *words]
    if step:
        command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0",
                   f"--wait={2 * seconds + 10:.0f}", *command]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asked:
        try:
            out, problems = asked.communicate(timeout=3 * seconds + 30)
        except subprocess.TimeoutExpired:
            asked.terminate()  # srun then ends its tasks
            out, problems = asked.communicate()
    reports = [json.loads(line.partition(MARK)[2]) for line in out.splitlines() if MARK in line]
    if len(reports) < nodes:
        print(problems[-2000:], file=sys.stderr)
    return reports


def _ask(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"{' '.join(command)}: {error}; start this on a node of the job, where Slurm's commands are"
        ) from None


def _address_of(node: str) -> str:
    fields = dict(word.partition("=")[::2] for word in _ask("scontrol", "-o", "show", "node", node))
    return fields.get("NodeAddr") or node


if __name__ == "__main__":
    run_command(main)
