"""`bench scaling`: steps on 1 to 8 processes of one thread each, split into computing, exchanging and waiting."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distributed.bench import training_speed
from distributed.bench.options import Options
from distributed.bench.scaling_model import SHARDS, Point, StepModel, fit, residuals
from distributed.bench.workload import Measurement, Workload
from distributed.host.cpu_quota import available_cpus

PROCESSES = (1, 2, 3, 4, 8)
MODES = {"fast": 0, "exact": SHARDS}
CHECK = 2  # this many processes on one core are not used for the fit: they check it
COMPUTE, BUSIEST = ", compute [ms]", ", compute on the busiest process [ms]"
EXCHANGE, OTHER_THREADS = ", exchange [ms]", ", other threads [ms]"
NO_CORE = ", ready but without a core [ms]"
Rounds = Sequence[dict[str, float]]


def name_of(mode: str, processes: int) -> str:
    return f"{mode}, {processes} process{'es' if processes > 1 else ''}"


def check_name(mode: str) -> str:
    return f"{name_of(mode, CHECK)} on one core"


def workloads(options: Options, folder: str) -> dict[str, Workload]:
    """Return every number of processes in both modes, on all cores, and the checks on one core."""
    found: dict[str, Workload] = {}
    for mode, shards in MODES.items():
        for number, processes in enumerate((*PROCESSES, CHECK)):
            is_check = number == len(PROCESSES)
            training = training_speed.ours(
                options, f"{folder}/{shards}-{number}", "--exact.shards", str(shards), ranks=processes, threads=1
            )
            settings = {**training.settings, "cores": 1 if is_check else available_cpus()}
            name = check_name(mode) if is_check else name_of(mode, processes)
            found[name] = replace(training, function=f"{training_speed.MODULES}.phases_of_steps:run", settings=settings)
    return found


def figures_of(name: str, _: Workload, measured: Measurement) -> dict[str, float]:
    """Return the wall time of a step and its phases in ms: means over the ranks, and the maximum of computing."""

    def mean(phase: str) -> float:
        return statistics.fmean(rank[phase] for rank in measured.figures)

    return {
        name: mean("wall"),
        f"{name}{COMPUTE}": mean("compute"),
        f"{name}{EXCHANGE}": mean("exchange"),
        f"{name}{OTHER_THREADS}": mean("other_threads"),
        f"{name}{NO_CORE}": mean("no_core"),
        f"{name}{BUSIEST}": max(rank["compute"] for rank in measured.figures),
    }


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """Return the speed on several processes relative to one."""
    return {
        f"{name_of(mode, processes)}: speed relative to one": figures[one] / figures[name_of(mode, processes)]
        for mode in MODES
        for processes in PROCESSES[1:]
        if (one := name_of(mode, 1)) in figures and name_of(mode, processes) in figures
    }


def medians(rounds: Rounds) -> dict[str, float]:
    """Return the median of each figure over the rounds that have it."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    return {name: statistics.median(figures[name] for figures in rounds if name in figures) for name in names}


def model_of(rounds: Rounds, mode: str, *, cores: int) -> StepModel | None:
    """Fit the model of one mode to steps measured on `cores` cores; None if fewer than three numbers of processes are there."""
    points = points_of(rounds, mode, cores=cores)
    return fit(points, exact=bool(MODES[mode])) if len(points) >= 3 else None


def points_of(rounds: Rounds, mode: str, *, cores: int) -> list[Point]:
    """Return the measured steps of one mode: the medians of the rounds."""
    found = medians(rounds)
    return [
        Point(
            processes, cores, found[name], found[name + BUSIEST], found[name + EXCHANGE] + found[name + OTHER_THREADS]
        )
        for processes in PROCESSES
        if (name := name_of(mode, processes)) in found
    ]


def content(rounds: Rounds, *, cores: int, predicted_cores: Sequence[int]) -> dict[str, Any]:
    """Return the models, their residuals and predictions, as JSON."""
    found: dict[str, Any] = {}
    for mode in MODES:
        if model := model_of(rounds, mode, cores=cores):
            check = medians(rounds).get(check_name(mode))
            found[mode] = {
                "coefficients [ms]": {name: value for name, value in model._asdict().items() if name != "exact"},
                "measured / model - 1": residuals(model, points_of(rounds, mode, cores=cores)),
                "check on one core [ms]": {"measured": check, "model": model.step(CHECK, 1)},
                "predicted [ms]": {
                    f"{n} cores": {name_of(mode, processes): model.step(processes, n) for processes in PROCESSES}
                    for n in predicted_cores
                },
            }
    return found
