"""Rows of text in columns."""

from collections.abc import Sequence

from distributed.runs.outcome import Outcome

HEADINGS = ("status", "epochs", "best validation", "test", "when", "minutes")


def cells(outcome: Outcome) -> list[str]:
    """An outcome under `HEADINGS`."""
    return [
        outcome.status,
        outcome.progress,
        accuracy(outcome.best),
        accuracy(outcome.test),
        outcome.when or "-",
        f"{outcome.minutes:.1f}",
    ]


def accuracy(point: tuple[int, float] | None) -> str:
    """`83.73% (epoch 10)`, or a dash."""
    return f"{point[1]:.2%} (epoch {point[0]})" if point else "-"


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, each column as wide as its widest text."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
