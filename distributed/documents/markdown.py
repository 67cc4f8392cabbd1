"""Pieces of a Markdown page."""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, without a line break at its end."""
    lines = ["|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""]) for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def paragraph(text: str) -> str:
    """Return the text wrapped at WIDTH columns."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def listed(words: Sequence[str]) -> str:
    """Return e.g. `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
