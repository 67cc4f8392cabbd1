"""The verbs that the training loop needs of an engine."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from distributed.data.batch import Batch


class Outcome(NamedTuple):
    """Of each sample, without gradients: losses [n] and logits [n, classes], at least float32."""

    losses: Tensor
    logits: Tensor


Loss = Callable[[nn.Module, Batch], tuple[Tensor, Outcome]]
"""The forward pass of a shard: (the shard's part of the step's mean loss, which has gradients; what is told of it)."""


class Engine(Protocol):
    """A model with its optimizer, spread over the ranks in some way that the loop need not know."""

    def evaluating(self) -> AbstractContextManager[None]:
        """For as long as this lasts the model evaluates: no dropout, running statistics, averaged weights if it has them."""
        ...

    def predict(self, batch: Batch) -> Tensor:
        """This rank's logits, [n, classes], in the precision of a forward pass, without gradients."""
        ...

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        """Forward and backward over this rank's part of a micro-batch, `loss` called once a shard.

        Gradients of all ranks and of a step's micro-batches are added up: after the `last` of them `step` may come.
        """
        ...

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        """Update the weights with the summed gradients, for the step of this number, counted from 0; the gradients' L2
        norm before clipping, a scalar on the device. Both numbers may be scalars on the device."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that training goes on from, by a canonical name: `model.fc1.weight`,
        `optimizer.fc1.weight.momentum_buffer`, `ema.fc1.weight`."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, or its `model.` part alone: the rest is then as at the start.

        Raises:
            ValueError: names or shapes do not fit, naming them.
        """
        ...
