"""`python -m distributed.experiments [--only I-10 ...]`: the seeds' eight results, run one after the other and put in a table.

Each is a plain torchrun of configs/seeds/ID.toml into RUNS/ID, so that a finished one is skipped and a stopped one goes on.
The table is made of what the run folders say. After each run it is merged into OUT.md and OUT.json: rows of runs on other
machines stay.
"""

import argparse
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distributed.config import from_command_line
from distributed.errors import ExitCode, prints_errors
from distributed.experiments.results import (
    CONFIGS,
    SEEDS,
    check_table,
    merged,
    read_table,
    results_in,
    table,
    write_results,
    write_table,
)
from distributed.files import home_path
from distributed.process import logs
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.streams import run_command
from distributed.process.torchrun import torchrun_command
from distributed.run.folder import RunFolder


@prints_errors
def main() -> int:
    """0: all asked for are finished; 75: time was up, the same command goes on; else what the first failed run ended with.

    Other settings (`--precision float32`) go to every run.
    """
    parser = argparse.ArgumentParser(prog="python -m distributed.experiments", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SEEDS, default=list(SEEDS), metavar="ID", help=", ".join(SEEDS))
    parser.add_argument("--data.root", dest="root", help="folder with the data sets")
    parser.add_argument("--runs", type=home_path, default=Path("runs/experiments"), help="folder of the run folders")
    parser.add_argument(
        "--out", type=home_path, default=Path("results/experiments"), help="the table, without .md and .json"
    )
    parser.add_argument("--nproc_per_node", default="1", help="processes, as of torchrun")
    parser.add_argument(
        "--minutes", type=float, help="stop, with everything saved, after so long; the same command goes on"
    )
    arguments, settings = parser.parse_known_args()
    logs.terminal_logs(0, level="WARNING")
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    failed: int = ExitCode.FINISHED
    check_table(arguments.out)
    read_table(arguments.out.with_suffix(".json"))  # refused now, not after hours
    for name in arguments.only:
        words = [str(CONFIGS / f"{name}.toml"), "--run_dir", str(arguments.runs / name), *settings]
        words += ["--data.root", arguments.root] if arguments.root else []
        from_command_line(words)  # what the run would refuse: torchrun would hide its exit code
        run = RunFolder(arguments.runs / name)
        before = run.status()
        code = _run(arguments.nproc_per_node, words, deadline)
        if code and (status := run.status()) != before:  # else it was refused before it began
            code = code if status.exit_code is None else status.exit_code
        with OptionalOutput(arguments.out):  # for now; the runs are what takes hours
            write_results(arguments.runs, arguments.out)
        if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
            return code
        failed = failed or code  # the next one may well work, and a rented machine is not for waiting
    results = results_in(arguments.runs)
    print(table(merged(results, arguments.out)))
    with requested_output("--out", arguments.out):
        write_table(results, arguments.out)
    return failed


def _run(processes: str, words: Sequence[str], deadline: float | None) -> int:
    """One run under torchrun up to the deadline; torchrun's exit code, or 75 where there was no time to begin."""
    if deadline and time.monotonic() >= deadline:
        return ExitCode.STOPPED
    command = torchrun_command(processes, "distributed.train", words)
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
