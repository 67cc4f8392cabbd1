"""Confusion matrices: counts of true and predicted classes over all ranks, and the results per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.comm import collectives
from distributed.data.batch import Batch
from distributed.errors import on_one_line

MAX_CLASSES = 5000  # with more, the matrix takes gigabytes

Counts = list[list[int]]
"""Number of images [true class][predicted class]."""


class ConfusionMatrix:
    """Counts predictions on the device: an observer for `evaluate`. Integer counts are exact at any world size."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, batch: Batch) -> None:
        """Count the predictions of logits [n, classes] for a batch."""
        classes = len(self._counts)
        cells = batch.labels * classes + logits.argmax(1)
        # Not bincount: on a GPU it synchronizes to read the largest value of its input.
        self._counts.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def read(self) -> Counts:
        """Return the counts over all ranks. A collective; call it once."""
        counts: Counts = collectives.sum_over_ranks_(self._counts).tolist()
        return counts


class Pair(NamedTuple):
    """The number of images of class `true` that were predicted as class `predicted`."""

    true: str
    predicted: str
    images: int


@dataclass(frozen=True)
class ClassResult:
    """The results of one class.

    Attributes:
        count: number of images of the class.
        recall: fraction of them that were predicted correctly; None without images.
        precision: fraction of the class's predictions that are correct; None without predictions.
        confused_with: the wrong class predicted most often; None if every prediction is correct.
    """

    name: str
    count: int
    recall: float | None
    precision: float | None
    confused_with: Pair | None


def by_class(counts: Counts, names: Sequence[str]) -> list[ClassResult]:
    """Return the results of each class, in the order of classes."""
    predicted = [sum(column) for column in zip(*counts, strict=True)]
    pairs = {pair.true: pair for pair in reversed(most_confused(counts, names))}
    return [
        ClassResult(
            name,
            sum(row),
            row[index] / sum(row) if sum(row) else None,
            row[index] / predicted[index] if predicted[index] else None,
            pairs.get(name),
        )
        for index, (name, row) in enumerate(zip(names, counts, strict=True))
    ]


def most_confused(counts: Counts, names: Sequence[str]) -> list[Pair]:
    """Return all confused pairs of classes, most frequent first, then in the order of classes."""
    pairs = [
        Pair(names[true], names[predicted], count)
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return sorted(pairs, key=lambda pair: -pair.images)


def as_lines(results: Sequence[ClassResult]) -> list[str]:
    """Format a table for the terminal: headings, then a line per class."""
    names = [on_one_line(result.name) for result in results]
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':{width}}  {'n':>6}  {'recall':>8}  {'precision':>9}  most confused with"]
    for name, result in zip(names, results, strict=True):
        pair = result.confused_with
        confused = f"{on_one_line(pair.predicted)} ({pair.images})" if pair else "-"
        lines.append(
            f"{name:{width}}  {result.count:>6,}  {_percent(result.recall):>8}  "
            f"{_percent(result.precision):>9}  {confused}"
        )
    return lines


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.2%}"
