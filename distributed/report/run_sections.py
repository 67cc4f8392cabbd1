"""What the page says of one run, part by part; a part that cannot be made says why. Torch comes in only where it is needed."""

from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from distributed.config import as_toml
from distributed.errors import InputError, NotFiniteError
from distributed.inference.saved_run import choose_checkpoint
from distributed.process.optional_output import one_line
from distributed.report.curves import run_curves, throughput
from distributed.report.history import History
from distributed.report.narrative import clock, how_it_ended, how_it_stands, learning_rate, what_it_is
from distributed.report.page import (
    Absent,
    Html,
    beside,
    folded,
    key_figures,
    missing,
    part,
    pictures,
    scrolled,
    table,
    text,
)
from distributed.run.checkpoint_layout import committed_names

if TYPE_CHECKING:
    from distributed.report.analysis import Checked, Findings

_AUGMENTED, _MISTAKES, _PAIRS = 24, 24, 10
_FOLDED_FROM = 25  # classes of a table that is not shown unasked


def run_parts(run: History, *, checkpoint: str, anchor: str) -> list[Html]:
    """All parts on a run.

    Args:
        anchor: by which the page's own links find it.
        checkpoint: the name of the one that is looked at.
    """
    look = _Look(run, checkpoint)
    tried: list[tuple[str, Callable[[], list[Html]]]] = [
        ("How it learned", lambda: [run_curves(run), text(*learning_rate(run))]),
        ("How fast", lambda: _speed(run)),
        ("What it gets right and wrong", lambda: _results(look.findings(), look.path())),
        ("Each class", lambda: _classes(look.findings())),
        ("Where it is wrong and most sure", lambda: _mistakes(look.findings())),
        ("What it is shown", lambda: _shown(run, look.checked())),
        ("What its first layer looks for", lambda: _filters(look.path())),
    ]
    head = [
        f'<h2 id="{escape(anchor)}">{escape(run.name)}</h2>',
        text(what_it_is(run)),
        key_figures(_figures(run)),
        _attempts(run),
    ]
    return [
        *head,
        *(_part(title, make) for title, make in tried),
        part("Its settings", folded("config.toml", as_toml(run.config))),
    ]


class _Look:
    """What is read of a run's data and checkpoint, once for all parts."""

    def __init__(self, run: History, name: str) -> None:
        self.run, self.name = run, name
        self.checked, self.findings = cache(self._checked), cache(self._findings)

    def path(self) -> Path:
        """The checkpoint's folder."""
        if not committed_names(self.run.folder.checkpoints):
            raise Absent("The run has saved no checkpoint yet, so there are no weights to look at.")
        return choose_checkpoint(self.run.folder.path, self.name)

    def _checked(self) -> "Checked":
        from distributed.report.analysis import Checked

        return Checked(self.run.config)

    def _findings(self) -> "Findings":
        return self.checked().findings(self.path(), mistakes=_MISTAKES)


def _part(title: str, make: Callable[[], list[Html]]) -> Html:
    try:
        return part(title, *make())
    except (Absent, InputError, NotFiniteError) as error:
        return missing(title, f"This part could not be made. {error}")
    except Exception as error:  # e.g. no matplotlib; or a run that continues deletes a checkpoint while it is read
        logger.warning("{}: {}; continuing without it", title, one_line(error))
        return missing(title, f"This part could not be made: {one_line(error)}.")


def _figures(run: History) -> list[tuple[str, str]]:
    figures = []
    if best := run.best("validation"):
        figures.append((f"best validation accuracy, epoch {best[0]}", f"{best[1]:.2%}"))
    epochs, accuracies = run.curve("test", "accuracy")
    if epochs:
        figures.append((f"test accuracy, epoch {epochs[-1]}", f"{accuracies[-1]:.2%}"))
    time, whole = run.wall_time
    figures.append(("epochs", f"{len(run.epochs)} of {run.config.epochs}"))
    figures.append(("wall time" if whole else "wall time of the attempts that were ended", clock(time)))
    return [*figures, ("status", run.status.status or "unknown")]


def _attempts(run: History) -> Html:
    rows = [
        [
            str(place),
            (attempt.started.time or "").replace("T", " ").replace("+0000", " UTC"),
            f"{attempt.started.step or 0:,}",
            attempt.hardware,
            clock(attempt.duration) if attempt.duration is not None else "unknown",
            how_it_ended(attempt, last=place == len(run.attempts)),
            attempt.started.git or "",
        ]
        for place, attempt in enumerate(run.attempts, 1)
    ]
    headings = ["", "started", "from step", "on", "took", "ended", "code"]
    several = f"It took {len(rows)} attempts, each of which went on where the one before had saved." if rows[1:] else ""
    versions = run.attempts[-1].started.versions or {} if run.attempts else {}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return part(
        "How it went",
        text(f"{how_it_stands(run)} {several}".strip()),
        table(headings, rows, numbers=[2]),
        text(f"Versions: {said}." if said else "", quiet=True),
    )


def _speed(run: History) -> list[Html]:
    drawn = throughput(run)
    rates = sorted(line.images_per_second or 0.0 for line in run.steps)
    waits = sorted(line.data_wait or 0.0 for line in run.steps)
    return [
        text(
            f"Half of the time it trained on more than {rates[len(rates) // 2]:,.0f} images a second, over all processes; "
            f"{waits[len(waits) // 2]:.1%} of the time went by waiting for images."
        ),
        drawn,
    ]


def _results(found: "Findings", checkpoint: Path) -> list[Html]:
    from distributed.figures.confusion import confusion_figure
    from distributed.figures.style import as_svg
    from distributed.inference.confusion import most_confused

    totals, names = found.totals, found.classes
    with confusion_figure(
        found.counts, names, title="test images by their class and what they are taken for"
    ) as figure:
        large = len(names) >= _FOLDED_FROM
        matrix = as_svg(figure, label="confusion matrix of the test images", shrinks=not large)
    counts = dict(zip(names, map(sum, found.counts), strict=True))
    pairs = [
        [pair.true, pair.predicted, f"{pair.images:,}", f"{pair.images / counts[pair.true]:.1%} of the class"]
        for pair in most_confused(found.counts, names)[:_PAIRS]
    ]
    said = text(
        f"The checkpoint {checkpoint.name} on the {totals.count:,} test images: {totals.accuracy:.2%} right, the right "
        f"class among the first five of {totals.accuracy5:.2%}, loss {totals.mean_loss:.4f}."
    )
    worst = table(["most confused", "taken for", "images", ""], pairs, numbers=[2]) if pairs else ""
    return [said, worst, scrolled(matrix)] if large else [said, beside(matrix, worst)]


def _classes(found: "Findings") -> list[Html]:
    from distributed.inference.confusion import by_class

    rows = []
    for one in by_class(found.counts, found.classes):
        parts = ["–" if part is None else f"{part:.1%}" for part in (one.recall, one.precision)]
        pair = one.confused_with
        rows.append([one.name, f"{one.count:,}", *parts, f"{pair.predicted} ({pair.images})" if pair else "–"])
    rows.sort(key=lambda row: -float(row[2].rstrip("%")) if row[2] != "–" else 1.0)
    drawn = table(["class", "images", "recall", "precision", "most confused with"], rows, numbers=[1, 2, 3])
    if len(rows) >= _FOLDED_FROM:
        drawn = f"<details><summary>All {len(rows)} classes</summary>{drawn}</details>"
    return [
        text(
            "Recall: which part of a class was recognized. Precision: which part of what was taken for it is of it. "
            "Best recognized first.",
            quiet=True,
        ),
        drawn,
    ]


def _mistakes(found: "Findings") -> list[Html]:
    if not found.mistakes:
        raise Absent("No test image was taken for another class than its own.")
    images = [
        (
            one.png,
            f"an image of {one.true} taken for {one.predicted}",
            f"<figcaption>is <b>{escape(one.true)}</b><br>taken for <b>{escape(one.predicted)}</b><br>"
            f"{min(one.probability, 0.9994):.1%} sure</figcaption>",
        )
        for one in found.mistakes
    ]
    return [text("Test images it took for something else, the surest first.", quiet=True), pictures(images, wide=True)]


def _shown(run: History, checked: "Checked") -> list[Html]:
    augment = run.config.data.augment.model_dump()
    said = ", ".join(f"{name} {str(value).lower()}" for name, value in augment.items())
    images = [(png, "a training image as changed at random", "") for png in checked.augmented(_AUGMENTED)]
    return [
        text(f"The first training images of the first epoch, after their random changes ({said}).", quiet=True),
        pictures(images),
    ]


def _filters(checkpoint: Path) -> list[Html]:
    from distributed.report.analysis import first_filters

    filters = first_filters(checkpoint)
    if filters is None:
        raise Absent("The network has no convolution over the three colours.")
    images = [(png, f"filter {place}", "") for place, png in enumerate(filters, 1)]
    return [
        text(
            "The first convolution's filters: grey is no weight, a colour is what raises the filter's answer.",
            quiet=True,
        ),
        pictures(images),
    ]
