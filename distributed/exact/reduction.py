"""Gradients of all shards summed in one tree, with no more traffic than a ring all-reduce.

Each rank adds up its own shards' gradients as they come, as far as the tree lets it; every rank gets its chunk of
everybody's sums and finishes the tree over it; then all get all chunks. How the numbers are cut into buckets and chunks
does not touch the sums.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from distributed.collectives import rank, world_size
from distributed.tree import Node, largest_nodes, leaves_of

_FIRST_BUCKET_BYTES = 2**20  # small, so that the exchange begins early, as in DistributedDataParallel


class Exchange(Protocol):
    """A flat run of numbers on its way from each rank's sums over some subtrees to the root's, on all ranks alike.

    Calls come in this order, a micro-step: `send` once `sums` are written, `reduce`, and `complete` after the last.
    """

    sums: Tensor
    """[subtrees of this rank, length]."""
    total: Tensor
    """[length], what all ranks have after `complete`: the sum over micro-steps of the tree's sums."""

    def send(self) -> None:
        """From any thread; of several exchanges in one order on all ranks."""

    def reduce(self, *, first: bool) -> None:
        """Finish the tree over a part of the numbers; take in place of the total where this is a step's first."""

    def complete(self, *, last: bool) -> None:
        """After this `sums` may be written again, and after the last micro-step `total` is whole."""


Nodes = list[list[Node]]
"""The subtrees that each rank adds up by itself."""


class TreeReduction:
    """The sum over `shards` shards of the gradients of some parameters; collective, all ranks alike.

    Args:
        parameters: all of one dtype and device.
        shards: of all ranks together; this rank holds `own`.
        open_exchange: (which subtrees each rank has, length, a tensor of the dtype and device) -> an `Exchange`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        shards: int,
        bucket_bytes: int,
        open_exchange: Callable[[Nodes, int, Tensor], Exchange],
    ) -> None:
        self.parameters = parameters
        held = [leaves_of(r, world_size(), shards) for r in range(world_size())]
        nodes = [largest_nodes(leaves) for leaves in held]
        self.own = held[rank()]
        self._slots = {node: slot for slot, node in enumerate(nodes[rank()])}
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, Node], Tensor] = {}
        self._buckets = [
            _Bucket(chosen, [parameters[i] for i in chosen], partial(open_exchange, nodes))
            for chosen in _chosen(parameters, bucket_bytes)
        ]
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.views}
        self._taken: set[tuple[int, int]] = set()
        self._sent = self._micro_step = 0

    def take(self, shard: int, index: int, gradient: Tensor) -> None:
        """Shard `shard` of all has this gradient of parameter `index`; used up. From any thread, once a micro-step each."""
        with self._lock:
            if (shard, index) in self._taken:
                raise RuntimeError(
                    f"exact mode: parameter {index} of the model got its gradient in several parts; no layer may be used both "
                    f"before and after a batch norm, and no connection may go around one"
                )
            self._taken.add((shard, index))
        bucket = self._bucket_of[index]
        places = bucket.views[index]
        node, total = Node(shard, 1), gradient
        while node not in self._slots:
            with self._lock:
                other = self._partial.pop((index, node.sibling), None)
                if other is None:
                    self._partial[index, node] = total
                    return
            node = node.parent
            if node in self._slots:
                _sum(total, other, places[self._slots[node]])
            else:
                own = total if total.dtype == bucket.dtype else torch.empty_like(total, dtype=bucket.dtype)
                total = _sum(total, other, own)
        if node.size == 1:
            places[self._slots[node]].copy_(gradient)
        with self._lock:
            bucket.missing -= 1
            while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
                self._buckets[self._sent].exchange.send()
                self._sent += 1

    def finish(self, *, last: bool) -> None:
        """After the backward pass of a micro-step; after the last of a step every `grad` is the sum over shards, and of the
        micro-steps in their order.

        Raises:
            RuntimeError: a parameter had no gradient; or a rank was lost.
        """
        if self._sent < len(self._buckets):
            count = sum(bucket.missing for bucket in self._buckets)
            raise RuntimeError(
                f"{count} gradients did not come: exact mode needs every parameter in every forward pass"
            )
        for bucket in self._buckets:
            bucket.exchange.reduce(first=not self._micro_step)
        for bucket in self._buckets:
            bucket.exchange.complete(last=last)
            bucket.missing = bucket.expected
        if last:
            for index, parameter in enumerate(self.parameters):
                parameter.grad = self._bucket_of[index].gradients[index]
        self._taken.clear()
        self._sent, self._micro_step = 0, 0 if last else self._micro_step + 1


class _Bucket:
    """Some parameters' gradients side by side; `views` has those of each subtree, `gradients` the root's."""

    def __init__(
        self, chosen: list[int], parameters: list[Tensor], open_exchange: Callable[[int, Tensor], Exchange]
    ) -> None:
        self.exchange = open_exchange(sum(p.numel() for p in parameters), parameters[0])
        sums = [_views(parameters, row) for row in self.exchange.sums]
        self.views = {index: [row[place] for row in sums] for place, index in enumerate(chosen)}
        self.gradients = dict(zip(chosen, _views(parameters, self.exchange.total), strict=True))
        self.dtype = parameters[0].dtype
        self.expected = self.missing = len(parameters) * len(sums)


def _sum(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a + b in the type of `out`, which may be a: gradients of low precision are added up in that of the weights."""
    return torch.add(a, b, out=out) if a.dtype == out.dtype else out.copy_(a).add_(b)


def _chosen(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """The parameters of each bucket, last first: gradients come in the opposite order of the parameters."""
    buckets: list[list[int]] = [[]]
    held, limit = 0, _FIRST_BUCKET_BYTES
    for index in reversed(range(len(parameters))):
        if held >= limit:
            buckets.append([])
            held, limit = 0, bucket_bytes
        buckets[-1].append(index)
        held += parameters[index].nbytes
    return buckets


def _views(parameters: list[Tensor], flat: Tensor) -> list[Tensor]:
    """The parameters' gradients as parts of a flat tensor, each in its parameter's memory layout."""
    views, offset = [], flat.storage_offset()
    for parameter in parameters:
        views.append(flat.as_strided(parameter.shape, parameter.stride(), offset))
        offset += parameter.numel()
    return views
