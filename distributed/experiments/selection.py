"""What the page shows of the records: those that ran as the catalogue plans, over seeds and against their base."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distributed.experiments.catalogue import Ablation, Experiment
from distributed.experiments.plan import planned_config
from distributed.experiments.result import Device, Result

DEVICES: tuple[Device, ...] = ("cpu", "gpu")


def as_planned(results: Sequence[Result], experiment: Experiment, device: Device) -> list[Result]:
    """Return the records of an experiment on a kind of device with the config, settings and epochs planned now, by seed."""
    planned = (experiment.id, experiment.config, tuple(sorted(experiment.settings)), planned_config(experiment).epochs)
    found = [r for r in results if (r.id, r.config, r.settings, r.of_epochs) == planned and r.machine.kind == device]
    return sorted(found, key=lambda result: result.seed)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of the test accuracies of complete runs; the deviation needs two of them."""

    mean: float
    deviation: float | None


def spread(results: Sequence[Result]) -> Spread | None:
    """Return the spread over seeds; None if no run is complete. A run that still continues does not count."""
    found = [result.test for result in results if result.is_complete and result.test is not None]
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Comparison:
    """An ablation on a kind of device.

    Args:
        result: its run, complete or not.
        difference: points of validation accuracy above the base, rounded to hundredths; None unless both are complete.
    """

    ablation: Ablation
    result: Result
    difference: float | None


def comparisons(results: Sequence[Result], ablations: Sequence[Ablation], device: Device) -> Iterator[Comparison]:
    """Yield the ablations that were run on a kind of device, bases included."""
    runs = {ablation.id: found[0] for ablation in ablations if (found := as_planned(results, ablation, device))}
    for ablation in ablations:
        if ablation.id in runs:
            yield Comparison(ablation, runs[ablation.id], _difference(runs[ablation.id], runs.get(ablation.base)))


def _difference(result: Result, base: Result | None) -> float | None:
    if base is None or base is result or not (base.is_complete and result.is_complete):
        return None
    if result.validation is None or base.validation is None or result.seed != base.seed:
        return None
    if (result.precision, result.exact_shards) != (base.precision, base.exact_shards):
        return None
    return round(result.validation - base.validation, 2) + 0.0  # not -0.0
