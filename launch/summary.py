"""`python -m launch.summary RUN`: the runs in a folder (RUN/seed-0, ...) side by side, and over the seeds mean and deviation.

Each task of an array calls it when it ends, so that the last one's table is whole; it also lies in RUN/summary.txt.
Imports no torch.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from distributed.config.layers import shown
from distributed.errors import ExitCode, InputError
from distributed.files import home_path, replace_text
from distributed.process.optional_output import OptionalOutput
from distributed.process.streams import run_command
from distributed.run.records import metrics_lines
from distributed.runs.outcome import outcome_of, runs_below
from distributed.runs.table import HEADINGS, cells, in_columns


def summary(folder: Path) -> str:
    """The table of `distributed.runs`, then mean and standard deviation over the finished seeds of each setting.

    Raises:
        InputError: no runs there.
    """
    runs = [run for run in runs_below(folder) if run != folder]
    if not runs:
        raise InputError(f"{folder}: no runs in it; name the folder that holds seed-0, seed-1, ...")
    outcomes = {run.relative_to(folder): outcome_of(run) for run in runs}
    lines = in_columns([["run", *HEADINGS], *([shown(name), *cells(outcome)] for name, outcome in outcomes.items())])
    finished_runs = [name for name, outcome in outcomes.items() if outcome.status == "finished"]
    groups: dict[str, list[dict[str, float]]] = {}
    for name in finished_runs:
        if name.name.startswith("seed-"):  # a mean over different settings would mean nothing
            groups.setdefault(str(name.parent), []).append(_last_figures(folder / name))
    for sweep, finished in groups.items():
        over = f"{'over' if sweep == '.' else f'{sweep}: over'} {len(finished)} finished seeds"
        lines.append(f"{over}: {_spread(finished)}")
    if waiting := len(runs) - len(finished_runs):
        lines.append(f"{waiting} of {len(runs)} runs that have begun are not finished")
    return "\n".join(lines) + "\n"


def _last_figures(run: Path) -> dict[str, float]:
    """The newest accuracy and loss of each split."""
    figures: dict[str, float] = {}
    for line in metrics_lines(run / "metrics.jsonl"):
        for split in ("validation", "test"):
            measured: Any = line.get(split)
            flat = measured if isinstance(measured, dict) else {}
            for figure in ("accuracy", "loss"):
                value = flat.get(figure, line.get(f"{split}_{figure}"))
                if isinstance(value, int | float):
                    figures[f"{split} {figure}"] = float(value)
    return figures


def _spread(finished: list[dict[str, float]]) -> str:
    """Mean and sample standard deviation of each figure that all have."""
    told = []
    for name in finished[0]:
        values = [figures[name] for figures in finished if name in figures]
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        told.append(f"{name} {statistics.fmean(values):.4f}{deviation}")
    return ", ".join(told)


def main() -> int:
    """The exit code: 0, or 2 where there is nothing."""
    try:
        if len(sys.argv) != 2:
            raise InputError("command line: give one folder: python -m launch.summary RUN")
        folder = home_path(sys.argv[1])
        text = summary(folder)
    except InputError as error:
        error.report()
        return ExitCode.BAD_INPUT
    except OSError as error:
        print(f"error: {error}; fix access to {sys.argv[1]}", file=sys.stderr)
        return ExitCode.STORAGE
    print(text, end="")
    with OptionalOutput(folder / "summary.txt"):
        replace_text(folder / "summary.txt", text)
    return ExitCode.FINISHED


if __name__ == "__main__":
    run_command(main)
