"""Totals of loss, correct predictions and samples as integers: exact whatever the order and grouping of the samples.

Losses are summed in fixed point, so a window of steps has a bit-identical total however a stop, a save or the ranks'
shards divided it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distributed.comm import collectives

_FRACTION_BITS = 40  # resolves 1e-12; the integer parts of losses are summed separately
_SCALE = 2.0**_FRACTION_BITS
_NO_BAD_STEP = 2**62


@dataclass(frozen=True)
class Totals:
    """Totals over some samples, on the host; `loss` in fixed point. Means over no samples are 0."""

    loss: int = 0
    correct: int = 0
    correct5: int = 0
    count: int = 0
    first_bad_step: int | None = None
    skipped_steps: int = 0

    @property
    def mean_loss(self) -> float:
        if self.first_bad_step is not None:
            return math.nan
        return self.loss / _SCALE / max(1, self.count)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.count)

    @property
    def accuracy5(self) -> float:
        return self.correct5 / max(1, self.count)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.loss + other.loss,
            self.correct + other.correct,
            self.correct5 + other.correct5,
            self.count + other.count,
            self.first_bad_step if self.first_bad_step is not None else other.first_bad_step,
            self.skipped_steps + other.skipped_steps,
        )


@dataclass(frozen=True)
class SplitTotals(Totals):
    """Totals over a split. `metrics` has the means of `evaluation.metrics` by name; NaN if a sample's is not finite."""

    metrics: Mapping[str, float] = field(default_factory=dict)


class TotalsAccumulator:
    """Accumulates totals on the device. Only `read` synchronizes."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.int64, device=device)
        self._bad_step = torch.full((1,), _NO_BAD_STEP, dtype=torch.int64, device=device)
        self._skipped = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, losses: Tensor, logits: Tensor, labels: Tensor, *, step: int | Tensor = 0) -> None:
        """Add a batch: per-sample losses [n], logits [n, classes], labels [n].

        A loss that is not finite marks the step as bad. With fewer than five classes every top-5 prediction is correct.
        """
        # A double of 2**53 or more has no fraction bits.
        integer, fraction, finite = _fixed_point_sum(losses, below=2.0**53)
        predicted = logits.argmax(1)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self._sums += torch.stack(
            [
                integer,
                fraction,
                (predicted == labels).sum(),
                top5.sum(),
                torch.full((), len(labels), dtype=torch.int64, device=labels.device),  # torch.tensor would synchronize
            ]
        )
        self._bad_step.clamp_(max=torch.where(finite.all(), _NO_BAD_STEP, step))

    @torch.no_grad()
    def add_step(self, grad_norm: Tensor) -> None:
        """Count a step whose gradient was not finite: float16 skipped it. All ranks have the same norm."""
        self._skipped += ~grad_norm.isfinite()

    def read(self) -> Totals:
        """Return the totals over all ranks since the last call and reset them. A collective that synchronizes."""
        integer, fraction, correct, correct5, count = collectives.sum_over_ranks_(self._sums).tolist()
        minus_first_bad, skipped = collectives.max_over_ranks_(torch.cat([-self._bad_step, self._skipped])).tolist()
        first_bad = -minus_first_bad
        self._sums.zero_()
        self._bad_step.fill_(_NO_BAD_STEP)
        self._skipped.zero_()
        return Totals(
            (integer << _FRACTION_BITS) + fraction, correct, correct5, count,
            None if first_bad == _NO_BAD_STEP else first_bad, skipped,
        )  # fmt: skip


class MetricSums:
    """Sums of further metrics on the device, as exact as the loss's. Only `read` synchronizes."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(len(names), 4, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, name: str, values: Tensor) -> None:
        """Add a batch: one number per sample, [n]."""
        integer, fraction, finite = _fixed_point_sum(values, below=2.0**42)  # two million of them fit into an int64
        count = torch.full((), len(values), dtype=torch.int64, device=values.device)
        self._sums[self._names.index(name)] += torch.stack([integer, fraction, finite.sum(), count])

    def read(self) -> dict[str, float]:
        """Return the means over all ranks. A collective if there are metrics; call it once."""
        if not self._names:
            return {}
        rows = collectives.sum_over_ranks_(self._sums).tolist()
        return {
            name: math.nan if finite < count else ((integer << _FRACTION_BITS) + fraction) / _SCALE / max(1, count)
            for name, (integer, fraction, finite, count) in zip(self._names, rows, strict=True)
        }


def _fixed_point_sum(numbers: Tensor, *, below: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the numbers, [n], as two int64 scalars, integer and fraction, and which were added, bool [n].

    A number that is not finite, or not smaller than `below`, is left out. Each number becomes an integer before it is
    added, so the grouping into batches does not matter. The sum's fraction is below 1: eight million batches of them fit
    into an int64, however many numbers a batch has.
    """
    exact = numbers.double()
    finite = exact.abs() < below  # NaN fails this comparison too
    exact = torch.where(finite, exact, 0.0)
    integer = exact.floor()
    fraction = ((exact - integer) * _SCALE).round().long().sum()
    return integer.long().sum() + (fraction >> _FRACTION_BITS), fraction & ((1 << _FRACTION_BITS) - 1), finite
