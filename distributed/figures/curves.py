"""Draws curves of runs: loss, accuracy and learning rate over epochs, and speed over steps. Imports no torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.figures.style import COLOURS, INK, SPLITS, as_png, figure
from distributed.files import replace_bytes
from distributed.run.metrics_log import MetricsLog, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", "--", "-.", ":")
_MARKERS_UP_TO = 30  # epochs; with more, markers would hide the line


@dataclass(frozen=True)
class NamedLog:
    """A run to draw: its name, its log, and whether validation lowers its learning rate (a plateau schedule)."""

    name: str
    log: MetricsLog
    plateau: bool = False


def draw_curves(metrics_file: Path, target: Path, *, title: str) -> None:
    """Draw a run's curves into a PNG. Draws nothing if no epoch has finished."""
    log = MetricsLog.read(metrics_file).without_gaps()
    if log.epochs:
        with run_curves(NamedLog("", log)) as made:
            made.suptitle(title)
            replace_bytes(target, as_png(made))


@contextmanager
def run_curves(run: NamedLog) -> Iterator["Figure"]:
    """Draw loss, accuracy and learning rate of one run with at least one finished epoch."""
    log = run.log
    with figure(11.5, 3.3, columns=3) as (made, [losses, accuracies, rates]):
        for split, colour in SPLITS.items():
            style: dict[str, Any] = {"color": colour, "label": split, "marker": _marker(log)}
            _plot(losses, log.curve(split, "loss"), **style)
            _plot(accuracies, log.curve(split), scale=100, **style)
        if best := log.best("validation"):
            _plot(accuracies, [best], scale=100, marker="o", markersize=9, mfc="none", mec=INK, linestyle="none",
                  label="best validation")  # fmt: skip
        _plot_rates(rates, run, color=COLOURS[3])
        losses.legend()
        accuracies.legend()
        for epoch, _, _ in log.lr_drops() if run.plateau else ():
            for axes in (losses, accuracies, rates):
                axes.axvline(epoch, color=INK, linestyle="--", linewidth=0.8, alpha=0.5)
        _label(losses, accuracies, rates, epochs=log.finished_epochs)
        yield made


@contextmanager
def overlaid_curves(runs: Sequence[NamedLog], *, split: str) -> Iterator["Figure"]:
    """Draw training loss, accuracy on a split, and learning rate of several runs; at least one has finished an epoch."""
    longest = max(len(run.name) for run in runs)
    columns = max(1, min(4, int(11.5 / (0.6 + 0.067 * longest))))  # inches: the width of a name in the legend's font
    rows = -(-len(runs) // columns)
    with figure(11.5, 3.4 + 0.17 * rows, columns=3) as (made, [losses, accuracies, rates]):
        for place, run in enumerate(runs):
            # The curves of bit-identical runs coincide: dashes let the lower ones be seen.
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place % len(_DASHES)]}
            marker = _marker(run.log)
            _plot(losses, run.log.curve("train", "loss"), label=run.name, marker=marker, **style)
            _plot(accuracies, run.log.curve(split), scale=100, marker=marker, **style)
            _plot_rates(rates, run, **style)
        _label(losses, accuracies, rates, epochs=max(run.log.finished_epochs for run in runs))
        losses.set_title("training loss")
        accuracies.set_title(f"{split} accuracy")
        made.legend(loc="outside lower center", ncols=columns)
        yield made


@contextmanager
def speed_curve(log: MetricsLog, *, restarts: Sequence[int]) -> Iterator["Figure"]:
    """Draw images per second at each logging step; `restarts` are the steps at which later attempts started."""
    with figure(11.5, 2.3) as (made, [axes]):
        steps, speeds = [line.step for line in log.steps], [line.images_per_second or 0.0 for line in log.steps]
        axes.plot(steps, speeds, color=COLOURS[2], linewidth=1.1)
        for place, step in enumerate(restarts):
            axes.axvline(step, color=COLOURS[1], linestyle=":", linewidth=1.2, label=None if place else "new attempt")
        if restarts:
            axes.legend()
        axes.set(xlabel="step", ylabel="images / s", ylim=(0, None))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        yield made


def _marker(log: MetricsLog) -> str | None:
    """Return a marker if epochs are few; a curve of a single epoch would be invisible without one."""
    return "o" if len(log.epochs) <= _MARKERS_UP_TO else None


def _plot(axes: "Axes", points: Sequence[Point], *, scale: float = 1, **style: Any) -> None:
    if points:
        axes.plot([point.epoch for point in points], [scale * point.value for point in points], **style)


def _plot_rates(axes: "Axes", run: NamedLog, **style: Any) -> None:
    per_epoch = run.log.steps_per_epoch
    if per_epoch is None:
        return
    if run.log.steps:
        points = [(line.step / per_epoch, line.lr or 0.0) for line in run.log.steps]
    else:
        points = [(line.epoch + 1, line.lr or 0.0) for line in run.log.epochs]
    if run.plateau:
        axes.set_yscale("log")  # its drops span orders of magnitude
        # The default formatter writes formulas, which figures do not parse.
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        style["drawstyle"] = "steps-pre"
    axes.plot([x for x, _ in points], [lr for _, lr in points], marker="o" if len(points) == 1 else None, **style)


def _label(losses: "Axes", accuracies: "Axes", rates: "Axes", *, epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes, title, unit in (
        (losses, "loss", ""),
        (accuracies, "accuracy", "top-1, %"),
        (rates, "learning rate", ""),
    ):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        # From 0, since a single epoch has no extent. Learning rates may extend beyond the last finished epoch.
        axes.set_xlim(0, max(1.04 * epochs + 0.1, axes.get_xlim()[1]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
