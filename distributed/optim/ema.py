"""Exponential moving average (EMA) of a model's weights."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightEMA:
    """Exponential moving average of a model's weights and of its batch-norm statistics.

    Args:
        live: the weights and statistics by name; for a sharded model, this rank's local tensors.
        decay: fraction of the average kept per step. At most (1 + step) / (10 + step), so that the initial weights lose
            their influence within the first steps.
        trained: names of the weights that the optimizer updates. Others may have infinities, e.g. attention masks.
    """

    def __init__(self, live: Mapping[str, Tensor], *, decay: float, trained: Collection[str] = ()) -> None:
        self.decay = decay
        self._live = {name: tensor for name, tensor in live.items() if tensor.is_floating_point()}
        self.tensors = {name: tensor.clone() for name, tensor in self._live.items()}
        constants = [n for n in self._live if n not in trained and not n.endswith(("running_mean", "running_var"))]
        self._infinite = [name for name in constants if not self._live[name].isfinite().all()]

    @torch.no_grad()
    def update(self, step: int | Tensor, *, skip: Tensor | None = None) -> None:
        """Average in the weights after `step`, counted from 0. A no-op where `skip` is 1.0."""
        self._average(step, skip)
        for name in self._infinite:  # infinity minus infinity is NaN
            average, live = self.tensors[name], self._live[name]
            average.copy_(torch.where(live.isfinite(), average, live))

    def _average(self, step: int | Tensor, skip: Tensor | None) -> None:
        averages, live = list(self.tensors.values()), list(self._live.values())
        if isinstance(step, Tensor):
            # In double, as for a Python number: in float32, 1 - 0.9999999 would be off by 19 %.
            weight = 1 - ((1 + step.double()) / (10 + step)).clamp(max=self.decay)
            weight = weight if skip is None else weight * (1 - skip)
            differences = torch._foreach_sub(live, averages)
            torch._foreach_mul_(differences, weight.to(differences[0].dtype))
            torch._foreach_add_(averages, differences)
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        if skip is None:
            torch._foreach_lerp_(averages, live, 1 - decay)
        else:
            torch._foreach_lerp_(averages, live, [(1 - decay) * (1 - skip)] * len(live))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the model; restore its own weights on exit. Context manager."""
        live, averages = list(self._live.values()), list(self.tensors.values())
        with torch.no_grad():
            saved = [tensor.clone() for tensor in live]
            torch._foreach_copy_(live, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, saved)
