"""The sections of the page on a checkpoint: results, classes, mistakes, images and filters. Imports torch only on demand."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from distributed.config import TrainConfig
from distributed.report.page import Absent, Html, Picture, beside, pictures, scrolled, table, text

if TYPE_CHECKING:
    from distributed.report.analysis import Analysis, Findings

_AUGMENTED, _PAIRS = 24, 10
_LARGE = 25  # classes; from here on tables are folded and the matrix gets the full width


def results(found: "Findings", checkpoint: str) -> list[Html]:
    """Return accuracy and loss, the confusion matrix and the most confused pairs."""
    from distributed.figures.confusion import confusion_figure
    from distributed.figures.style import as_svg
    from distributed.inference.confusion import most_confused

    totals, names = found.totals, found.class_names
    summary = text(
        f"Checkpoint {checkpoint} on {totals.count:,} test images: top-1 accuracy {totals.accuracy:.2%}, top-5 accuracy "
        f"{totals.accuracy5:.2%}, loss {totals.mean_loss:.4f}"
        + "".join(f", {name} {value:.4f}" for name, value in totals.metrics.items())
        + "."
    )
    if found.counts is None:
        return [summary]
    large = len(names) >= _LARGE
    with confusion_figure(found.counts, names, title="test images by true and predicted class") as figure:
        matrix = as_svg(figure, label="confusion matrix of the test images", shrinks=not large)
    counts = dict(zip(names, map(sum, found.counts), strict=True))
    pairs = [
        [pair.true, pair.predicted, f"{pair.images:,}", f"{pair.images / counts[pair.true]:.1%} of the class"]
        for pair in most_confused(found.counts, names)[:_PAIRS]
    ]
    confused = table(["true class", "predicted", "images", ""], pairs, numbers=[2]) if pairs else ""
    return [summary, confused, scrolled(matrix)] if large else [summary, beside(matrix, confused)]


def classes(found: "Findings") -> list[Html]:
    """Return a table of recall and precision per class, best recall first.

    Raises:
        Absent: there are too many classes.
    """
    from distributed.inference.confusion import by_class

    if found.counts is None:
        raise Absent("There are too many classes for the results of each.")
    ordered = sorted(
        by_class(found.counts, found.class_names), key=lambda one: 1.0 if one.recall is None else -one.recall
    )
    rows = []
    for one in ordered:
        fractions = ["–" if value is None else f"{value:.1%}" for value in (one.recall, one.precision)]
        pair = one.confused_with
        rows.append([one.name, f"{one.count:,}", *fractions, f"{pair.predicted} ({pair.images})" if pair else "–"])
    per_class = table(["class", "images", "recall", "precision", "most confused with"], rows, numbers=[1, 2, 3])
    if len(rows) >= _LARGE:
        per_class = f"<details><summary>All {len(rows)} classes</summary>{per_class}</details>"
    return [
        text(
            "Recall: fraction of a class that was predicted correctly. Precision: fraction of a class's predictions that "
            "are correct. Sorted by recall.",
            quiet=True,
        ),
        per_class,
    ]


def mistakes(found: "Findings") -> list[Html]:
    """Return the wrongly predicted test images, most confident first."""
    if not found.mistakes:
        raise Absent("Every test image was predicted correctly.")
    images = [
        Picture(
            one.png,
            f"an image of {one.true} predicted as {one.predicted}",
            f"<figcaption>true: <b>{escape(one.true)}</b><br>predicted: <b>{escape(one.predicted)}</b><br>"
            f"confidence {min(one.probability, 0.9994):.1%}</figcaption>",
        )
        for one in found.mistakes
    ]
    return [text("Wrongly predicted test images, most confident first.", quiet=True), pictures(images, wide=True)]


def augmented(config: TrainConfig, analysis: "Analysis") -> list[Html]:
    """Return training images as the network sees them."""
    settings = ", ".join(f"{name} {str(value).lower()}" for name, value in config.data.augment.model_dump().items())
    images = [Picture(png, "an augmented training image") for png in analysis.augmented(_AUGMENTED)]
    return [
        text(f"The first training images of the first epoch, after augmentation ({settings}).", quiet=True),
        pictures(images),
    ]


def filters(checkpoint: Path) -> list[Html]:
    """Return the filters of the first convolution."""
    from distributed.report.analysis import first_filters

    found = first_filters(checkpoint)
    if found is None:
        raise Absent("The network has no convolution over three colour channels.")
    return [
        text(
            "Filters of the first convolution: grey is a weight of 0; colours that match the filter activate it.",
            quiet=True,
        ),
        pictures(Picture(png, f"filter {number}") for number, png in enumerate(found, 1)),
    ]
