"""`python -m launch.summary FOLDER [--by METRIC]`: a table of the runs in a folder, the best first.

Below it are mean and standard deviation over the seeds of each setting. Also writes the table to FOLDER/summary.txt and,
with --by and a validation metric, the settings of the best run to FOLDER/best.toml. Each task of an array does so when it
ends, so the last one writes the complete table.
"""

import re
import statistics
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, as_toml, with_values
from distributed.config.layers import shown
from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import home_path, replace_text
from distributed.inference.saved_run import read_config
from distributed.process.arguments import OneLineParser
from distributed.process.optional_output import OptionalOutput
from distributed.process.streams import run_command
from distributed.run.lock_holder import SlurmQueries
from distributed.run.metrics_log import FIGURES, MetricsLog, Point
from distributed.runs.outcome import outcome_of, runs_below
from distributed.runs.table import HEADINGS, cells, in_columns, number
from launch import sweep

METRICS = tuple(f"{split}.{figure}" for split, figure in product(("validation", "test"), FIGURES))
# The end of a run's name that distinguishes the seeds of one setting, e.g. `lr=0.1/seed-0`.
_SEED = re.compile(r"(?:^|/)seed-\d+$")


def summary(folder: Path, metric: str = METRICS[0]) -> str:
    """Return the table of `distributed.runs`, best run first, and statistics over the finished seeds of each setting.

    Raises:
        InputError: the folder holds no runs.
    """
    runs = {str(run.relative_to(folder)): run for run in _trials(folder)}
    if not runs:
        raise InputError(f"{folder}: no runs in it; name the folder that holds seed-0, seed-1, ...")
    query_slurm = SlurmQueries()
    outcomes = {name: outcome_of(run, query_slurm) for name, run in runs.items()}
    best = {name: found for name, run in runs.items() if (found := best_epoch(run, metric))}
    is_listed = metric == METRICS[0]  # as `best validation`
    rows = [["run", *HEADINGS, *([] if is_listed else [metric])]]
    for name in _sorted(list(runs), best, metric):
        rows.append([shown(name), *cells(outcomes[name]), *([] if is_listed else [number(best.get(name))])])
    lines = in_columns(rows)
    finished = [name for name in runs if outcomes[name].status == "finished"]
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


def best_epoch(run: Path, metric: str) -> Point | None:
    """Return the first epoch with the best value of a metric; None if the run never measured it."""
    split, _, figure = metric.partition(".")
    try:
        log = MetricsLog.read(run / "metrics.jsonl")
    except InputError:
        return None
    curve = log.curve(split, "loss" if figure == "loss" else "accuracy")
    return min(curve, key=lambda point: _rank(point, metric), default=None)


def _rank(point: Point, metric: str) -> float:
    """Return a number that is lower for a better value."""
    return point.value if metric.endswith("loss") else -point.value


def _trials(folder: Path) -> list[Path]:
    """Return the run folders of a sweep, without those of runs with `best.toml`."""
    return [run for run in runs_below(folder) if run != folder and run.relative_to(folder).parts[0] != "best"]


def _sorted(names: list[str], best: Mapping[str, Point], metric: str) -> list[str]:
    """Return the names of runs, best first; those without the metric last, in their own order."""
    return sorted(names, key=lambda name: (name not in best, _rank(best[name], metric) if name in best else 0.0))


def write_summary(folder: Path, metric: str) -> str:
    """Write the table and, as `best.toml`, the settings of the best run; return the table and a line about that run.

    Raises:
        InputError: the folder holds no runs.
    """
    text = summary(folder, metric)
    best = {run: found for run in _trials(folder) if (found := best_epoch(run, metric))}
    if best:
        run = min(best, key=lambda run: _rank(best[run], metric))
        name, value = shown(run.relative_to(folder)), _formatted(best[run].value, metric)
        with OptionalOutput(folder / "best.toml"):
            config = _elsewhere(read_config(run), folder, run)
            replace_text(folder / "best.toml", f"# {name}: {value}\n{as_toml(config)}")
            text += f"best: {name}, {value}; its settings: {folder / 'best.toml'}\n"
    with OptionalOutput(folder / "summary.txt"):
        replace_text(folder / "summary.txt", text)
    return text


def _elsewhere(config: TrainConfig, folder: Path, run: Path) -> TrainConfig:
    """Return a trial's config with a run folder and an upload URL of its own, and the threads of any machine."""
    values: dict[str, Any] = {"run_dir": folder / "best", "threads": 0}
    if url := config.checkpoint.upload_to:
        base = url.rstrip("/").removesuffix(f"/{sweep.as_url_path(str(run.relative_to(folder)))}")
        values["checkpoint"] = config.checkpoint.model_copy(update={"upload_to": f"{base}/best"})
    return with_values(config, **values)


def _formatted(value: float, metric: str) -> str:
    split, _, figure = metric.partition(".")
    return f"{value:.2%} {split} accuracy" if figure == "accuracy" else f"{split} loss {value:.4f}"


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
    parser = OneLineParser(prog="python -m launch.summary", description=__doc__)
    parser.add_argument("folders", nargs="*", type=home_path, metavar="FOLDER")
    parser.add_argument(
        "--by",
        metavar="METRIC",
        help=f"{', '.join(METRICS)}: sort by it; validation metrics also write the best run's settings to best.toml",
    )
    options = parser.parse_args()
    if len(options.folders) != 1:
        raise InputError("command line: give one folder: python -m launch.summary FOLDER")
    if options.by and options.by not in METRICS:
        raise InputError(f"command line: --by {options.by}: should be one of {' | '.join(METRICS)}")
    [folder] = options.folders
    try:
        # Test images never choose a trial.
        chooses = options.by in sweep.METRICS
        text = write_summary(folder, options.by) if chooses else summary(folder, options.by or METRICS[0])
    except OSError as error:
        print(f"error: {error}; fix access to {folder}", file=sys.stderr)
        return ExitCode.STORAGE
    print(text, end="")
    if not chooses:
        with OptionalOutput(folder / "summary.txt"):
            replace_text(folder / "summary.txt", text)
    return ExitCode.FINISHED


if __name__ == "__main__":
    run_command(main)
