"""Gradients of all shards summed in one tree, with no more traffic than a ring all-reduce.

Each rank adds up its own shards' gradients as they come, as far as the tree lets it; every rank gets its chunk of
everybody's sums and finishes the tree over it; then all get all chunks. How the numbers are cut into buckets and chunks
does not touch the sums.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed.comm.collectives import rank, world_size
from distributed.comm.reduction_tree import Node, covering_subtrees, shard_range
from distributed.exact.bucket_layout import BucketLayout, ReplicatedBucket, ShardedBucket, add, buckets_of
from distributed.exact.partition import BlockPartition

_FIRST_BUCKET_BYTES = 2**20  # small, so that the exchange begins early, as in DistributedDataParallel


class BucketReduce(Protocol):
    """A flat run of numbers on its way from each rank's sums over some subtrees to the root's, on all ranks alike.

    Calls come in this order, a micro-step: `send` once `sums` are written, `reduce`, and `complete` after the last.
    """

    def sums(self, slot: int) -> Tensor:
        """[length] of a subtree of this rank, to be written."""

    total: Tensor
    """What this rank has after `complete`: the sum over micro-steps of the tree's sums, [length] or its chunk of it."""

    def send(self) -> None:
        """Start the exchange. All ranks do so at the same point of the pass, in the same order."""

    def reduce(self, *, first: bool) -> None:
        """Finish the tree over a part of the numbers; take in place of the total where this is a step's first."""

    def complete(self, *, last: bool) -> None:
        """After this `sums` may be written again, and after the last micro-step `total` is whole."""


Nodes = list[list[Node]]
"""The subtrees that each rank adds up by itself."""


class GradientReducer:
    """The sum over `shards` shards of the gradients of some parameters; collective, all ranks alike.

    Args:
        parameters: all of one dtype and device.
        shards: of all ranks together; this rank holds `own`.
        open_exchange: (which subtrees each rank has, how gradients lie, a tensor of the dtype and device) -> an `Exchange`.
        parts: where weights are sharded, this rank's of each parameter: they get the gradients, each its part.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        shards: int,
        bucket_bytes: int,
        open_exchange: Callable[[Nodes, BucketLayout, Tensor], BucketReduce],
        parts: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters = parts or parameters
        held = [shard_range(r, world_size(), shards) for r in range(world_size())]
        nodes = [covering_subtrees(leaves) for leaves in held]
        self.own = held[rank()]
        self._dtype = parameters[0].dtype
        self._slots = {node: slot for slot, node in enumerate(nodes[rank()])}
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, Node], tuple[Tensor, torch.cuda.Event | None]] = {}
        self._buckets = []
        for chosen in buckets_of(parameters, bucket_bytes, first_bucket_bytes=_FIRST_BUCKET_BYTES):
            lie: BucketLayout = ReplicatedBucket({index: parameters[index] for index in chosen})
            if parts:
                lie = ShardedBucket({index: BlockPartition(parameters[index], shards=shards) for index in chosen})
            exchange = open_exchange(nodes, lie, parameters[0])
            self._buckets.append(_Bucket(chosen, lie, exchange, expected=len(chosen) * len(nodes[rank()])))
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.chosen}
        self._taken: set[tuple[int, int]] = set()
        self._full = self._sent = self._micro_step = 0

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
        node, total = Node(shard, 1), gradient
        while node not in self._slots:
            with self._lock:
                found = self._partial.pop((index, node.sibling), None)
                if found is None:
                    # The sibling may be summed with it on another stream.
                    written = torch.cuda.current_stream().record_event() if total.is_cuda else None
                    self._partial[index, node] = total, written
                    return
            other, written = found
            if written:
                torch.cuda.current_stream().wait_event(written)
            node = node.parent
            if node in self._slots:
                bucket.lie.write_sum(bucket.exchange.sums(self._slots[node]), index, total, other)
            else:
                own = total if total.dtype == self._dtype else torch.empty_like(total, dtype=self._dtype)
                total = add(total, other, own)
        if node.size == 1:
            bucket.lie.put(bucket.exchange.sums(self._slots[node]), index, gradient)
        with self._lock:
            bucket.missing -= 1
            while self._full < len(self._buckets) and not self._buckets[self._full].missing:
                self._full += 1

    def send_full(self) -> None:
        """Start the exchange of every full bucket. Call it only at a barrier of all shards on all ranks: thread timing
        decides when a bucket fills, but collectives need the same order on all ranks."""
        for bucket in self._buckets[self._sent : self._full]:
            bucket.exchange.send()
        self._sent = self._full

    def finish(self, *, last: bool) -> None:
        """After the backward pass of a micro-step; after the last of a step every `grad` is the sum over shards, and of the
        micro-steps in their order.

        Raises:
            RuntimeError: a parameter had no gradient; or a rank was lost.
        """
        if self._full < len(self._buckets):
            count = sum(bucket.missing for bucket in self._buckets)
            raise RuntimeError(
                f"{count} gradients did not come: exact mode needs every parameter in every forward pass"
            )
        self.send_full()
        for bucket in self._buckets:
            bucket.exchange.reduce(first=not self._micro_step)
        for bucket in self._buckets:
            bucket.exchange.complete(last=last)
            bucket.missing = bucket.expected
            if last:
                for index, gradient in bucket.lie.gradients(bucket.exchange.total).items():
                    self.parameters[index].grad = gradient
        self._taken.clear()
        self._full = self._sent = 0
        self._micro_step = 0 if last else self._micro_step + 1


@dataclass
class _Bucket:
    """Some parameters' gradients; `missing` counts those of this rank's subtrees that have not come yet."""

    chosen: list[int]
    lie: BucketLayout
    exchange: BucketReduce
    expected: int

    def __post_init__(self) -> None:
        self.missing = self.expected
