"""The operations that a run needs of an engine: training, evaluating, saving and loading."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from distributed.data.batch import Batch
from distributed.engine.sharding import LocalTensor


class Outcome(NamedTuple):
    """Per-sample losses [n] and logits [n, classes], detached, in float32 or wider."""

    losses: Tensor
    logits: Tensor


Loss = Callable[[nn.Module, Batch], tuple[Tensor, Outcome]]
"""Runs the forward pass of one or several shards. Returns their contribution to the mean loss of the step, with gradients, and
their `Outcome`."""


class Engine(Protocol):
    """A model with its optimizer, distributed over the ranks in a way that the training loop need not know."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Put the model into evaluation mode: no dropout, running statistics, EMA weights if there are any. Context manager."""
        ...

    def predict(self, batch: Batch) -> Tensor:
        """Return this rank's logits [n, classes], without gradients, in the dtype of the forward pass."""
        ...

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        """Run forward and backward over this rank's part of a micro-batch.

        `loss` is called once per shard, or once for several shards where that gives the same bits.

        Gradients are summed over ranks and over the micro-batches of a step. `step` may be called after the `last` of them.
        """
        ...

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        """Update the weights with the summed gradients of step number `step`, counted from 0.

        Return the gradients' L2 norm before clipping, a scalar on the device. lr and step may be scalars on the device.
        """
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor needed to resume, by canonical name, e.g. `model.fc1.weight`,
        `optimizer.fc1.weight.momentum_buffer`, `ema.fc1.weight`; a collective."""
        ...

    def local_tensors(self) -> Mapping[str, LocalTensor]:
        """Return this rank's parts of the tensors that `state` yields, by the same names, without the loss scale."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` yielded. If only `model.` tensors are given, all others are reset to their initial values.

        Raises:
            ValueError: names or shapes do not fit the model; names them.
        """
        ...
