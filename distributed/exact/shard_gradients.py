"""Collects the gradients of one shard, or of a group of shards, and makes sure that none is missing."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

AddGradient = Callable[[int, int, Tensor], None]
"""Takes the number of a shard, the index of a parameter, and that shard's gradient of it."""


class NotGroupableError(Exception):
    """A network computes with its parameters in a way that does not keep the shards of a group apart."""


class ShardGradients:
    """Passes gradients on, each once per shard and parameter.

    Args:
        shards: indices over all ranks.
        index: the index of each parameter.
    """

    def __init__(self, shards: range, index: Mapping[Tensor, int], add_gradient: AddGradient) -> None:
        self._shards, self._add_gradient = shards, add_gradient
        self._missing = {shard: dict(index) for shard in shards}

    def add(self, shard: int, parameter: Tensor, gradient: Tensor) -> None:
        """Pass on a shard's gradient of a parameter."""
        index = self._missing[shard].pop(parameter, None)
        if index is None:
            raise NotGroupableError("a layer is used several times")
        self._add_gradient(shard, index, gradient)

    def add_single(self, parameter: Tensor, gradient: Tensor) -> None:
        """Pass on the gradient of the only shard."""
        self.add(self._shards.start, parameter, gradient)

    def refuse(self, parameter: Tensor, gradient: Tensor) -> None:
        """Reject a gradient that is summed over all shards of a group."""
        raise NotGroupableError("a parameter is used outside its layer")

    def fill(self) -> None:
        """Pass on zeros for the parameters that have received no gradient."""
        for shard, missing in self._missing.items():
            for parameter in list(missing):
                self.add(shard, parameter, torch.zeros_like(parameter))
