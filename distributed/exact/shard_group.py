"""Several shards of a rank that pass through the model as one batch, so that most kernels run once for all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardGroup:
    """Consecutive shards, and the sink of their gradients of parameters, which are summed over each shard alone.

    sizes: number of samples in each shard.
    hand_over: called with a parameter and each shard's gradient of it.
    flush: called before a synchronization point of the backward pass. Ranks that run their shards one by one have passed on all
        gradients by then, and full buckets are sent there, on all ranks in the same order.
    """

    sizes: tuple[int, ...]
    hand_over: Callable[[Tensor, Sequence[Tensor]], None]
    flush: Callable[[], None]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return each shard's part of a tensor [n, ...]."""
        return torch.split_with_sizes(tensor, self.sizes)  # Tensor.split takes twice as long


_group: ContextVar[ShardGroup | None] = ContextVar("_group", default=None)


@contextmanager
def use_group(group: ShardGroup | None) -> Iterator[None]:
    """Let the layers of `grouped_layers` know which shards their batch consists of. Context manager, of this greenlet."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def current_group() -> ShardGroup | None:
    """Return the group whose batch passes through the model, or None if a single shard does."""
    return _group.get()
