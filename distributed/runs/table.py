"""Formats outcomes of runs as a table of text."""

from collections.abc import Sequence

from distributed.run.metrics_log import Point
from distributed.runs.outcome import Outcome

HEADINGS = ("status", "epochs", "best validation", "test", "when", "minutes")


def cells(outcome: Outcome) -> list[str]:
    """Return an outcome's cells under `HEADINGS`."""
    return [
        outcome.status,
        outcome.progress,
        accuracy(outcome.best),
        accuracy(outcome.test),
        outcome.when or "-",
        f"{outcome.minutes:.1f}",
    ]


def accuracy(point: Point | None) -> str:
    """Format an accuracy as `83.73% (epoch 10)`, or `-` if there is none."""
    return f"{point.value:.2%} (epoch {point.epoch})" if point else "-"


def number(point: Point | None) -> str:
    """Format a metric of any unit as `0.2513 (epoch 10)`, or `-` if there is none."""
    return f"{point.value:.4f} (epoch {point.epoch})" if point else "-"


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
