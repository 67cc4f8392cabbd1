"""`python -m distributed.experiments [--only I-10 ...]`: reproduce the eight results of the two reference implementations.

Each run is a plain torchrun of configs/seeds/ID.toml into RUNS/ID: a finished run is skipped, a stopped one resumes. After
each run the results are merged into OUT.md and OUT.json, which keep the rows of runs on other machines.
"""

import argparse
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distributed.config import from_command_line
from distributed.errors import ExitCode, prints_errors
from distributed.experiments.results import CONFIGS, REFERENCES, read_results
from distributed.experiments.table import check_table, format_table, merge, write_table
from distributed.files import home_path
from distributed.process import logs
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.streams import run_command
from distributed.process.torchrun import torchrun_command
from distributed.run.folder import RunFolder


@prints_errors
def main() -> int:
    """Return 0 if all runs finished, 75 if time was up, otherwise the exit code of the first run that failed.

    Other settings, e.g. `--precision float32`, are passed to every run.
    """
    arguments, settings = _parser().parse_known_args()
    if arguments.root:
        settings += ["--data.root", arguments.root]
    logs.terminal_logs(0, level="WARNING")
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    failed: int = ExitCode.FINISHED
    check_table(arguments.out)  # before the runs, which take hours
    for name in arguments.only:
        code = _run(RunFolder(arguments.runs / name), name, settings, arguments.nproc_per_node, deadline)
        with OptionalOutput(arguments.out):  # interim results must not end the runs
            write_table(read_results(arguments.runs), arguments.out)
        if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
            return code
        failed = failed or code  # the next run may still succeed
    results = read_results(arguments.runs)
    print(format_table(merge(results, arguments.out)))
    with requested_output("--out", arguments.out):
        write_table(results, arguments.out)
    return failed


def _parser() -> argparse.ArgumentParser:
    names = list(REFERENCES)
    parser = argparse.ArgumentParser(prog="python -m distributed.experiments", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ID", help=", ".join(names))
    parser.add_argument("--data.root", dest="root", help="folder with the data sets")
    parser.add_argument("--runs", type=home_path, default=Path("runs/experiments"), help="folder of the run folders")
    parser.add_argument(
        "--out", type=home_path, default=Path("results/experiments"), help="path of the table, without .md or .json"
    )
    parser.add_argument("--nproc_per_node", default="1", help="number of processes, as for torchrun")
    parser.add_argument(
        "--minutes", type=float, help="save everything and stop after this time; the same command resumes"
    )
    return parser


def _run(run: RunFolder, name: str, settings: Sequence[str], processes: str, deadline: float | None) -> int:
    """Run an experiment and return its exit code.

    Raises:
        InputError: the settings are invalid.
    """
    arguments = [str(CONFIGS / f"{name}.toml"), "--run_dir", str(run.path), *settings]
    from_command_line(arguments)  # torchrun would hide exit code 2
    before = run.status()
    code = _torchrun(processes, arguments, deadline)
    if code and (status := run.status()) != before:  # unchanged if the run was refused
        code = code if status.exit_code is None else status.exit_code
    return code


def _torchrun(processes: str, arguments: Sequence[str], deadline: float | None) -> int:
    """Run torchrun until the deadline; return its exit code, or 75 if no time was left to start."""
    if deadline and time.monotonic() >= deadline:
        return ExitCode.STOPPED
    command = torchrun_command(processes, "distributed.train", arguments)
    print("+", " ".join(command[1:]), flush=True)
    run = subprocess.Popen(command)
    try:
        return run.wait(deadline and max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)  # torchrun passes it on; the run saves at its next step
        return ExitCode.STOPPED if run.wait() else ExitCode.FINISHED
    except KeyboardInterrupt:
        run.wait()
        return ExitCode.INTERRUPTED


if __name__ == "__main__":
    run_command(main)
