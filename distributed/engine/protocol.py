"""The verbs that the training loop needs of an engine."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """A model with its optimizer, spread over the ranks in some way that the loop need not know."""

    model: nn.Module
    """Called with (images, sample_keys); returns logits."""

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of a forward pass."""
        ...

    def micro_step(self, *, sync: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; gradients are exchanged in the one with `sync`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of the step's mean loss. The parts' SUM over ranks is what `step` uses."""
        ...

    def step(self, lr: float) -> Tensor:
        """Update the weights with the exchanged gradients, then clear these; their L2 norm before clipping, a scalar."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that training goes on from, by a canonical name: `model.fc1.weight`,
        `optimizer.fc1.weight.momentum_buffer`."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: names or shapes do not fit, naming them.
        """
        ...
