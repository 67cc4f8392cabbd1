"""Which classes are taken for which: counts over all ranks, and what they say of each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.comm import collectives
from distributed.data.batch import Batch

Counts = list[list[int]]
"""[true class][predicted class] images."""


class ConfusionSums:
    """Counts on the device, taken in batch by batch: an observer for `loop.evaluate`. Integers: exact on any ranks."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, batch: Batch) -> None:
        """Take in logits [n, classes] and the batch's labels."""
        classes = len(self._counts)
        cells = batch.labels * classes + logits.argmax(1)
        # Not bincount, which on a GPU waits for its input's largest value.
        self._counts.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def read(self) -> Counts:
        """The counts over all ranks; a collective, to be called once."""
        counts: Counts = collectives.sum_over_ranks_(self._counts).tolist()
        return counts


class Pair(NamedTuple):
    """So many images of one class were taken for another."""

    true: str
    predicted: str
    images: int


@dataclass(frozen=True)
class ClassResult:
    """One class: its images, how many of them were found, and how many of those taken for it are of it.

    `recall` and `precision` are None where there is nothing to divide by; `confused_with` where nothing was confused.
    """

    name: str
    count: int
    recall: float | None
    precision: float | None
    confused_with: Pair | None


def by_class(counts: Counts, names: Sequence[str]) -> list[ClassResult]:
    """What the counts say of each class, in order of class."""
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
    """All pairs of different classes of which images were confused, the most frequent first, then by class."""
    pairs = [
        Pair(names[true], names[predicted], count)
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return sorted(pairs, key=lambda pair: -pair.images)


def as_lines(results: Sequence[ClassResult]) -> list[str]:
    """A table for a terminal, a line a class, under a line of headings."""
    width = max(len("class"), *(len(result.name) for result in results))
    lines = [f"{'class':{width}}  {'n':>6}  {'recall':>8}  {'precision':>9}  most confused with"]
    for result in results:
        pair = result.confused_with
        confused = f"{pair.predicted} ({pair.images})" if pair else "-"
        lines.append(
            f"{result.name:{width}}  {result.count:>6,}  {_percent(result.recall):>8}  "
            f"{_percent(result.precision):>9}  {confused}"
        )
    return lines


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.2%}"
