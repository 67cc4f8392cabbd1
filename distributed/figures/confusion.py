"""Draws a confusion matrix that is readable from ten classes to a hundred."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distributed.errors import plain
from distributed.figures.style import COLOURS, INK, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERS_UP_TO = 20  # classes; with more, a cell is too small for a number
_NAMES_UP_TO = 150  # with more, the picture does not grow: that of a thousand classes would take gigabytes


@contextmanager
def confusion_figure(counts: Sequence[Sequence[int]], names: Sequence[str], *, title: str) -> Iterator["Figure"]:
    """Draw the number of images [true][predicted]; a cell's colour is its fraction of the true class."""
    few = len(names) <= _NUMBERS_UP_TO
    side = max(4.4, 1.8 + 0.5 * len(names)) if few else 2.6 + 0.135 * min(len(names), _NAMES_UP_TO)
    with figure(side + 0.6, side) as (made, [axes]):
        totals = [max(1, sum(row)) for row in counts]
        fractions = [[count / total for count in row] for row, total in zip(counts, totals, strict=True)]
        _draw_cells(made, axes, fractions)
        if few:
            _write_counts(axes, counts, fractions)
        if len(names) <= _NAMES_UP_TO:
            _write_names(axes, list(map(plain, names)), few=few)  # matplotlib refuses names that are not UTF-8
        axes.tick_params(labelsize=8 if few else 5.5, length=0, pad=2)
        axes.set(xlabel="predicted class", ylabel="true class", title=title)
        yield made


def _draw_cells(made: "Figure", axes: "Axes", fractions: list[list[float]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    # From transparent to opaque, for light and dark pages. The square root makes rare confusions visible.
    shades = LinearSegmentedColormap.from_list("shades", [(*_rgb(COLOURS[0]), 0.0), (*_rgb(COLOURS[0]), 1.0)])
    drawn = axes.imshow(fractions, cmap=shades, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    bar = made.colorbar(drawn, ax=axes, shrink=0.6, pad=0.02, ticks=[0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)
    bar.set_label("fraction of the true class", fontsize=8)


def _write_names(axes: "Axes", names: Sequence[str], *, few: bool) -> None:
    upright = not few or max(len(name) for name in names) <= 3
    axes.set_xticks(range(len(names)), names, rotation=90 if not few else 0 if upright else 40)
    if not upright:
        for label in axes.get_xticklabels():
            label.set(rotation_mode="anchor", horizontalalignment="right")
    axes.set_yticks(range(len(names)), names)


def _write_counts(axes: "Axes", counts: Sequence[Sequence[int]], fractions: list[list[float]]) -> None:
    for true, row in enumerate(counts):
        for predicted, count in enumerate(row):
            if count:
                colour = "white" if fractions[true][predicted] > 0.25 else INK
                axes.text(predicted, true, f"{count}", ha="center", va="center", fontsize=7, color=colour)


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue
