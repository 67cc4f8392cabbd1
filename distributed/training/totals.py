"""Totals of loss, correct answers and samples as integers: exact in any order, over any cut of the work.

Losses are added up in fixed point, so that a window of steps has the same sum to the last bit however it was cut by a
stop, a save or the ranks' shards.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from distributed.comm import collectives

_FRACTION_BITS = 40  # resolves 1e-12; whole losses are added up apart
_SCALE = 2.0**_FRACTION_BITS


@dataclass(frozen=True)
class Totals:
    """Sums over some samples, on the host; `loss` in fixed point. Means are 0 where there was no sample."""

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

    def __add__(self, other: Self) -> "Totals":
        return Totals(
            self.loss + other.loss,
            self.correct + other.correct,
            self.correct5 + other.correct5,
            self.count + other.count,
            self.first_bad_step if self.first_bad_step is not None else other.first_bad_step,
            self.skipped_steps + other.skipped_steps,
        )


_NEVER = 2**62


class MetricAccumulator:
    """Sums on the device that nobody has to wait for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.int64, device=device)
        self._bad_step = torch.full((1,), _NEVER, dtype=torch.int64, device=device)
        self._skipped = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, losses: Tensor, logits: Tensor, labels: Tensor, *, step: int | Tensor = 0) -> None:
        """Take in a batch: per-sample losses [n], logits [n, classes], labels [n]. A loss that is no number marks the step.
        Of fewer than five classes, the right one is always among the first five."""
        # Each loss is made an integer before any are added up, so that it does not matter which stand in one batch.
        exact = losses.double()
        finite = exact.abs() < 2.0**53  # beyond, a double has no fraction left; no number at all fails it too
        exact = torch.where(finite, exact, 0.0)
        whole = exact.floor()
        fraction = ((exact - whole) * _SCALE).round()
        answers = logits.argmax(1)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self._sums += torch.stack(
            [
                whole.long().sum(),
                fraction.long().sum(),
                (answers == labels).sum(),
                top5.sum(),
                torch.full((), len(labels), dtype=torch.int64, device=labels.device),  # a copy from the host would wait
            ]
        )
        self._bad_step.clamp_(max=torch.where(finite.all(), _NEVER, step))

    @torch.no_grad()
    def add_step(self, grad_norm: Tensor) -> None:
        """Count a step whose gradient was not finite, which float16 skips; all ranks have its norm alike."""
        self._skipped += ~grad_norm.isfinite()

    def read(self) -> Totals:
        """The sums over all ranks since the last reading; a collective, and on a GPU a wait."""
        whole, fraction, correct, correct5, count = collectives.sum_over_ranks_(self._sums).tolist()
        minus_first_bad, skipped = collectives.max_over_ranks_(torch.cat([-self._bad_step, self._skipped])).tolist()
        first_bad = -minus_first_bad
        self._sums.zero_()
        self._bad_step.fill_(_NEVER)
        self._skipped.zero_()
        return Totals(
            (whole << _FRACTION_BITS) + fraction, correct, correct5, count,
            None if first_bad == _NEVER else first_bad, skipped,
        )  # fmt: skip
