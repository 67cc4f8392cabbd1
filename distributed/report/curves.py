"""The curves of a run, and of several over each other. Imports no torch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distributed.figures.style import COLOURS, INK, SPLITS, as_png, as_svg, figure
from distributed.report.history import History
from distributed.report.narrative import drops
from distributed.report.page import Absent, Html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", "--", "-.", ":")
_DOTTED_UP_TO = 30  # epochs; with more, points would hide the line


def run_curves(run: History) -> Html:
    """Loss, accuracy and learning rate.

    Raises:
        Absent: no epoch was finished.
    """
    if not run.epochs:
        raise Absent("No epoch was finished yet, so there is nothing to draw.")
    with figure(11.5, 3.3, columns=3) as (made, [losses, accuracies, rates]):
        marker = _marker(run)
        for split, colour in SPLITS.items():
            for axes, measured, scale in ((losses, "loss", 1), (accuracies, "accuracy", 100)):
                epochs, values = run.curve(split, measured)
                if epochs:
                    axes.plot(epochs, [scale * v for v in values], color=colour, label=split, marker=marker)
        best = run.best("validation")
        if best:
            accuracies.plot([best[0]], [100 * best[1]], "o", markersize=9, mfc="none", mec=INK, label="best validation")
        _draw_rates(rates, run, color=COLOURS[3])
        losses.legend()
        accuracies.legend()
        for axes in (losses, accuracies, rates):
            _mark_drops(axes, run)
        _label(losses, accuracies, rates, epochs=run.epochs[-1].epoch + 1)
        return as_svg(made, label=f"loss, accuracy and learning rate of {run.name} over epochs")


def overlaid_curves(runs: Sequence[History]) -> Html:
    """Training loss, held-out accuracy and learning rate of several runs.

    Raises:
        Absent: none has finished an epoch.
    """
    with _overlaid(runs) as (made, split):
        return as_svg(made, label=f"training loss, {split} accuracy and learning rate of {len(runs)} runs over epochs")


def overlaid_picture(runs: Sequence[History]) -> bytes:
    """The same as a PNG.

    Raises:
        Absent: none has finished an epoch.
    """
    with _overlaid(runs) as (made, _):
        return as_png(made)


@contextmanager
def _overlaid(runs: Sequence[History]) -> Iterator[tuple["Figure", str]]:
    """The figure, and the split whose accuracy it shows."""
    if not any(run.epochs for run in runs):
        raise Absent("No run has finished an epoch yet, so there is nothing to draw.")
    split = "validation" if all(run.best("validation") for run in runs if run.epochs) else "test"
    with figure(11.5, 3.6, columns=3) as (made, [losses, accuracies, rates]):
        for place, run in enumerate(runs):
            # Runs of the same bits lie on top of each other: the lower ones are seen between the dashes.
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place % len(_DASHES)]}
            marker = _marker(run)
            losses.plot(*run.curve("train", "loss"), label=run.name, marker=marker, **style)
            epochs, values = run.curve(split, "accuracy")
            accuracies.plot(epochs, [100 * v for v in values], marker=marker, **style)
            _draw_rates(rates, run, **style)
        _label(losses, accuracies, rates, epochs=max(run.epochs[-1].epoch + 1 for run in runs if run.epochs))
        losses.set_title("training loss")
        accuracies.set_title(f"{split} accuracy")
        made.legend(loc="outside lower center", ncols=4)
        yield made, split


def throughput(run: History) -> Html:
    """Images a second at each logging step, with the starts of attempts marked.

    Raises:
        Absent: no logging step was reached.
    """
    if not run.steps:
        raise Absent("No training step was logged, so no speed is known.")
    steps = [line.step for line in run.steps]
    with figure(11.5, 2.3) as (made, [axes]):
        axes.plot(steps, [line.images_per_second or 0.0 for line in run.steps], color=COLOURS[2], linewidth=1.1)
        starts = [attempt.started.step or 0 for attempt in run.attempts[1:]]
        for place, step in enumerate(starts):
            axes.axvline(step, color=COLOURS[1], linestyle=":", linewidth=1.2, label=None if place else "a new attempt")
        if starts:
            axes.legend()
        axes.set(xlabel="step", ylabel="images / s", ylim=(0, None))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        return as_svg(made, label=f"training speed of {run.name} over steps")


def _marker(run: History) -> str | None:
    """A point an epoch: of a single epoch a line alone would show nothing."""
    return "o" if len(run.epochs) <= _DOTTED_UP_TO else None


def _draw_rates(axes: "Axes", run: History, **style: Any) -> None:
    per_epoch = run.steps_per_epoch
    if per_epoch is None:
        return
    if run.steps:
        points = [(line.step / per_epoch, line.lr or 0.0) for line in run.steps]
    else:
        points = [(line.epoch + 1, line.lr or 0.0) for line in run.epochs]
    if run.config.schedule.name == "plateau":
        axes.set_yscale("log")  # its drops span orders of magnitude
        style["drawstyle"] = "steps-pre"
    axes.plot([x for x, _ in points], [lr for _, lr in points], marker="o" if len(points) == 1 else None, **style)


def _mark_drops(axes: "Axes", run: History) -> None:
    for epoch, _, _ in drops(run) if run.config.schedule.name == "plateau" else ():
        axes.axvline(epoch, color=INK, linestyle="--", linewidth=0.8, alpha=0.5)


def _label(losses: "Axes", accuracies: "Axes", rates: "Axes", *, epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes, title, unit in (
        (losses, "loss", "cross-entropy"),
        (accuracies, "accuracy", "top-1, %"),
        (rates, "learning rate", ""),
    ):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        # From the start: a single epoch has no range of its own. Learning rates may go beyond the last epoch's end.
        axes.set_xlim(0, max(1.04 * epochs + 0.1, axes.get_xlim()[1]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
