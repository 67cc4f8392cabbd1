"""Draws accuracies of several runs over minutes of training. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from distributed.figures.style import COLOURS, as_png, figure

_DASHES = {"test": "-", "validation": "--"}
_MARKERS = ("", "o", "s")  # a second or third run of the same colour


@dataclass(frozen=True)
class AccuracyCurve:
    """The accuracies of a run on a split: per epoch the minutes until then, and per cent."""

    name: str
    split: str
    points: tuple[tuple[float, float], ...]


def accuracy_over_minutes(curves: Sequence[AccuracyCurve], *, title: str, description: str) -> bytes:
    """Return a PNG with a line per curve: a colour per run, and validation dashed.

    Args:
        description: text for the file's metadata.
    """
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys(curve.name for curve in curves))
    with figure(9.0, 4.2) as (made, [axes]):
        for curve in curves:
            minutes, accuracies = zip(*curve.points, strict=True)
            round_of_colours, colour = divmod(names.index(curve.name), len(COLOURS))
            marker = _MARKERS[round_of_colours % len(_MARKERS)]
            axes.plot(
                minutes, accuracies, label=f"{curve.name}, {curve.split}", linestyle=_DASHES[curve.split],
                color=COLOURS[colour], marker=marker or None,
            )  # fmt: skip
        axes.set_xscale("log")  # the shortest runs take a hundredth of the longest
        # The default formatter writes formulas, which figures do not parse.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # else a run of 2 to 9 minutes has no tick
        axes.xaxis.set_major_formatter(lambda minute, _: f"{minute:g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set(title=title, xlabel="minutes of training and evaluation", ylabel="top-1, %")
        axes.legend(loc="lower right", ncols=2 if len(curves) > 6 else 1)
        return as_png(made, description=description)
