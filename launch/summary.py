"""`python -m launch.summary FOLDER`: a table of the runs in a folder, with mean and standard deviation over their seeds.

Also writes it to FOLDER/summary.txt. Each task of an array does so when it ends, so the last one writes the complete
table. Imports no torch.
"""

import re
import statistics
import sys
from itertools import product
from pathlib import Path

from distributed.config.layers import shown
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import home_path, replace_text
from distributed.process.optional_output import OptionalOutput
from distributed.process.streams import run_command
from distributed.run.metrics_log import FIGURES, MetricsLog
from distributed.runs.outcome import outcome_of, runs_below
from distributed.runs.table import HEADINGS, cells, in_columns

# The end of a run's name that distinguishes the seeds of one setting: `lr=0.1/seed-0` on Slurm, `lr=0.1,seed=0` on Ray.
_SEED = re.compile(r"(?:^|[/,])seed[-=]\d+$")


def summary(folder: Path) -> str:
    """Return the table of `distributed.runs`, then mean and standard deviation over the finished seeds of each setting.

    Raises:
        InputError: the folder holds no runs.
    """
    runs = [run for run in runs_below(folder) if run != folder]
    if not runs:
        raise InputError(f"{folder}: no runs in it; name the folder that holds seed-0, seed-1, ...")
    outcomes = {str(run.relative_to(folder)): outcome_of(run) for run in runs}
    lines = in_columns([["run", *HEADINGS], *([shown(name), *cells(outcome)] for name, outcome in outcomes.items())])
    finished = [name for name, outcome in outcomes.items() if outcome.status == "finished"]
    settings: dict[str, list[dict[str, float]]] = {}
    for name in finished:
        if seed := _SEED.search(name):  # a mean over different settings would be meaningless
            settings.setdefault(name[: seed.start()], []).append(_last_metrics(folder / name))
    for setting, metrics in settings.items():
        prefix = f"{shown(setting)}: " if setting else ""
        seeds = f"{len(metrics)} finished seed{'s' if len(metrics) > 1 else ''}"
        lines.append(f"{prefix}over {seeds}: {_mean_and_deviation(metrics)}")
    if unfinished := len(runs) - len(finished):
        lines.append(f"unfinished runs: {unfinished} of {len(runs)}")
    return "\n".join(lines) + "\n"


def _last_metrics(run: Path) -> dict[str, float]:
    """Return the newest accuracy and loss of each split."""
    log = MetricsLog.read(run / "metrics.jsonl")
    last = {f"{split} {figure}": log.last(split, figure) for split, figure in product(("validation", "test"), FIGURES)}
    return {name: point.value for name, point in last.items() if point}


def _mean_and_deviation(metrics: list[dict[str, float]]) -> str:
    """Format mean and sample standard deviation of each metric, over the runs that have it."""
    formatted = []
    for name in metrics[0]:
        values = [run[name] for run in metrics if name in run]
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        formatted.append(f"{name} {statistics.fmean(values):.4f}{deviation}")
    return ", ".join(formatted)


@prints_errors
def main() -> int:
    """Return the exit code: 0, or 2 if the folder holds no runs."""
    try:
        if len(sys.argv) != 2:
            raise InputError("command line: give one folder: python -m launch.summary FOLDER")
        folder = home_path(sys.argv[1])
        text = summary(folder)
    except OSError as error:
        print(f"error: {error}; fix access to {sys.argv[1]}", file=sys.stderr)
        return ExitCode.STORAGE
    print(text, end="")
    with OptionalOutput(folder / "summary.txt"):
        replace_text(folder / "summary.txt", text)
    return ExitCode.FINISHED


if __name__ == "__main__":
    run_command(main)
