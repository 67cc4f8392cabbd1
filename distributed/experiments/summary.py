"""The table that `python -m distributed.experiments` prints, and the texts in its cells. Imports no torch."""

from collections.abc import Iterable

from distributed.documents.markdown import table
from distributed.experiments.result import Result

DATA_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def summary(results: Iterable[Result]) -> str:
    """Return a table with a row per run."""
    header = ["id", "seed", "network, data", "epochs", "validation", "test", "minutes", "settings", "on"]
    return table(header, [_row(result) for result in results])


def _row(result: Result) -> list[str]:
    return [
        result.id, str(result.seed), f"{result.model}, {result.data}", epochs(result),
        per_cent(result.validation), per_cent(result.test), minutes(result.minutes), " ".join(result.settings),
        f"{result.machine.device}, {mode(result)}",
    ]  # fmt: skip


def per_cent(value: float | None) -> str:
    """Return e.g. `94.05 %`; a dash if it was not measured."""
    return "-" if value is None else f"{value:.2f} %"


def epochs(result: Result) -> str:
    """Return the number of finished epochs, and of planned ones if there are more."""
    text = f"{result.epochs}" if result.epochs == result.of_epochs else f"{result.epochs} of {result.of_epochs}"
    return f"{text}, ended early" if result.ended_early else text


def minutes(value: float) -> str:
    """Return the minutes with as many digits as mean anything."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def mode(result: Result) -> str:
    """Return processes, precision and mode, e.g. `2 processes, bfloat16, exact (8)`."""
    processes = f"{result.processes} process{'' if result.processes == '1' else 'es'}"
    return f"{processes}, {result.precision}, {f'exact ({result.exact_shards})' if result.exact_shards else 'fast'}"
