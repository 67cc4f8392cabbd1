"""`python -m distributed.experiments [--only ID ...] [--seeds 0 1 2]`: train the experiments of the catalogue.
`python -m distributed.experiments page`: write the figures of docs/results.md from results/results.json.

Each run is a plain torchrun into RUNS/ID-SEED: a finished run is skipped, a stopped one resumes. After each run its result is
merged into the file OUT, which keeps the records of other runs and machines.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distributed.errors import ExitCode, prints_errors
from distributed.experiments.catalogue import CATALOGUE, KINDS, chosen
from distributed.experiments.page import write_page
from distributed.experiments.plan import PlannedRun, planned_run
from distributed.experiments.read_run import read_result
from distributed.experiments.records import check_results, merged, read_results, write_results
from distributed.experiments.result import Result
from distributed.experiments.summary import summary
from distributed.files import home_path
from distributed.process import logs
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import OptionalOutput, requested_output
from distributed.process.session import end_with_parent
from distributed.process.streams import run_command
from distributed.process.torchrun import torchrun_command


@prints_errors
def main() -> int:
    """Return 0 if all runs finished, 75 if time was up, otherwise the exit code of the first run that failed.

    Other settings, e.g. `--precision float32`, are passed to every run.
    """
    if sys.argv[1:2] == ["page"]:
        OneLineParser(prog="python -m distributed.experiments page").parse_args(sys.argv[2:])
        print(*write_page(), sep="\n")
        return ExitCode.FINISHED
    arguments, settings = _parser().parse_known_args()
    if arguments.root:
        settings += ["--data.root", arguments.root]
    logs.terminal_logs(0, level="WARNING")
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    check_results(arguments.out)  # before the runs, which take hours
    runs = [
        planned_run(experiment, seed, arguments.runs, settings)
        for experiment in chosen(arguments.only)
        for seed in dict.fromkeys(arguments.seeds or experiment.seeds)
    ]
    failed: int = ExitCode.FINISHED
    for run in runs:
        code = _train(run, arguments.nproc_per_node, deadline)
        with OptionalOutput(arguments.out):  # interim results must not end the runs
            write_results(_results([run]), arguments.out)
        if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
            return code
        failed = failed or code  # the next run may still succeed
    results = _results(runs)
    names = {run.experiment.id for run in runs}
    print(summary(record for record in merged(read_results(arguments.out), results) if record.id in names))
    with requested_output("--out", arguments.out):
        write_results(results, arguments.out)
    return failed


def _parser() -> argparse.ArgumentParser:
    names = [*KINDS, *CATALOGUE]
    parser = OneLineParser(prog="python -m distributed.experiments", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=names, default=list(KINDS), metavar="ID",
        help=f"ids, or all of a kind; default: all. {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the catalogue")
    parser.add_argument("--data.root", dest="root", help="folder with the data sets")
    parser.add_argument("--runs", type=home_path, default=Path("runs/experiments"), help="folder of the run folders")
    parser.add_argument(
        "--out", type=home_path, default=Path("results/results.json"), help="file that results are merged into"
    )
    parser.add_argument("--nproc_per_node", default="1", help="number of processes, as for torchrun")
    parser.add_argument(
        "--minutes", type=float, help="save everything and stop after this time; the same command resumes"
    )
    return parser


def _train(run: PlannedRun, processes: str, deadline: float | None) -> int:
    """Train a run and return its exit code."""
    before = run.folder.status()
    code = _torchrun(processes, run.arguments, deadline)
    if code and (status := run.folder.status()) != before:  # unchanged if the run was refused
        code = code if status.exit_code is None else status.exit_code
    return code


def _results(runs: Sequence[PlannedRun]) -> list[Result]:
    return [result for run in runs if (result := read_result(run.experiment, run.folder))]


def _torchrun(processes: str, arguments: Sequence[str], deadline: float | None) -> int:
    """Run torchrun until the deadline; return its exit code, or 75 if no time was left to start."""
    if deadline is not None and time.monotonic() >= deadline:
        return ExitCode.STOPPED
    command = torchrun_command(processes, "distributed.train", arguments)
    print("+", shlex.join(command[1:]), flush=True)
    run = subprocess.Popen(command, preexec_fn=end_with_parent)
    try:
        return run.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGTERM)  # torchrun passes it on; the run saves at its next step
        return ExitCode.STOPPED if run.wait() else ExitCode.FINISHED
    except KeyboardInterrupt:
        run.wait()
        return ExitCode.INTERRUPTED
    finally:  # after SIGTERM
        if run.poll() is None:
            run.terminate()
            run.wait()


if __name__ == "__main__":
    run_command(main, starts_processes=True)
