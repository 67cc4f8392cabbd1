"""Collects the gradients of a shard, or of a group of shards, and makes sure that none is missing."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distributed.errors import InputError

_MOST_BYTES = 4 * 2**20  # of a group's gradients that wait to be added together


class GradientSums(Protocol):
    """Adds up gradients over shards; see `GradientReducer`."""

    def add_gradient(self, shard: int, index: int, gradient: Tensor) -> None: ...

    def add_gradients(self, shards: range, gradients: Mapping[int, Sequence[Tensor]]) -> None: ...


class NotGroupableError(Exception):
    """A network computes with its parameters in a way that does not keep the shards of a group apart."""


class SingleShard:
    """Passes on the gradients of one shard.

    Args:
        index: the index of each parameter.
    """

    def __init__(self, shard: int, index: Mapping[Tensor, int], sums: GradientSums) -> None:
        self._shard, self._sums, self._missing = shard, sums, dict(index)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Pass on the gradient of a parameter.

        Raises:
            InputError: it is not one of the network's, e.g. one of the loss.
        """
        if parameter not in self._missing:
            raise InputError(
                f"a tensor of shape {list(parameter.shape)} requires a gradient, but is no parameter of the network; make it "
                "one, or set requires_grad to False"
            )
        self._sums.add_gradient(self._shard, self._missing.pop(parameter), gradient)

    def finish(self) -> None:
        """Pass on zeros for the parameters that have received no gradient."""
        for parameter in list(self._missing):
            self.add(parameter, torch.zeros_like(parameter))


class GroupedShards:
    """Passes on the gradients of consecutive shards, those of several parameters at a time.

    Args:
        index: the index of each parameter.
    """

    def __init__(self, shards: range, index: Mapping[Tensor, int], sums: GradientSums) -> None:
        self._shards, self._sums, self._missing = shards, sums, dict(index)
        self._waiting: dict[int, Sequence[Tensor]] = {}
        self._bytes = 0

    def add_of_shards(self, parameter: Tensor, gradients: Sequence[Tensor]) -> None:
        """Pass on each shard's gradient of a parameter."""
        index = self._missing.pop(parameter, None)
        if index is None:
            raise NotGroupableError("a layer is used several times")
        self._waiting[index] = gradients
        self._bytes += len(gradients) * gradients[0].nbytes
        if self._bytes > _MOST_BYTES:
            self.flush()

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Reject a gradient that is summed over all shards."""
        raise NotGroupableError("a parameter is used outside its layer")

    def finish(self) -> None:
        """Pass on what is left, and zeros for the parameters that have received no gradient."""
        for parameter in list(self._missing):
            self.add_of_shards(parameter, [torch.zeros_like(parameter)] * len(self._shards))
        self.flush()

    def flush(self) -> None:
        """Pass on what is waiting."""
        if self._waiting:
            self._sums.add_gradients(self._shards, self._waiting)
        self._waiting, self._bytes = {}, 0
