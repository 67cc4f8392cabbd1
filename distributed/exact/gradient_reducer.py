"""Sums the gradients of all shards in one tree, with the traffic of a ring all-reduce if world_size is a power of two.

Each rank sums its own shards' gradients as they arrive, as far up the tree as it can. Every rank then receives its chunk of
all ranks' partial sums and finishes the tree for it; finally all ranks gather all chunks. How gradients are grouped into
buckets and chunks does not affect the sums.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed.comm.collectives import rank, world_size
from distributed.comm.reduction_tree import Node, covering_subtrees, shard_range
from distributed.exact.bucket_layout import BucketLayout, ReplicatedBucket, ShardedBucket, add, buckets_of
from distributed.exact.partition import BlockPartition

_FIRST_BUCKET_BYTES = 2**20  # small, so that communication starts early, as in DistributedDataParallel


class BucketReduce(Protocol):
    """Reduces one flat buffer from each rank's subtree sums to the sum over all shards; a collective.

    Per micro-step, all ranks call `start` once the subtree sums are written, then `reduce`, then `wait`.
    """

    total: Tensor
    """After the last `wait`: the tree's sum, added up over micro-steps; [length], or this rank's chunk of it."""

    def subtree_sum(self, slot: int) -> Tensor:
        """Return the buffer [length] to which the sum of this rank's subtree number `slot` is to be written."""

    def start(self) -> None:
        """Start the communication. All ranks must start their buckets in the same order, at the same point of the pass."""

    def reduce(self, *, first: bool) -> None:
        """Finish the tree for this rank's chunk and add it to the total; if `first` in a step, overwrite the total."""

    def wait(self, *, last: bool) -> None:
        """Wait until subtree sums may be written again and, after the `last` micro-step, until `total` is complete."""


SubtreesOfRanks = list[list[Node]]
"""The subtrees that each rank sums on its own, by rank."""


class GradientReducer:
    """Sums gradients over `shards` shards. All methods that communicate are collectives.

    Args:
        parameters: all of one dtype and device.
        shards: total number of shards on all ranks; this rank has the range `own_shards`.
        open_bucket_reduce: called with the subtrees of each rank, the layout of a bucket, and a tensor of its dtype and device.
        local: for sharded weights, this rank's part of each parameter, whose `.grad` is set instead.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        shards: int,
        bucket_bytes: int,
        open_bucket_reduce: Callable[[SubtreesOfRanks, BucketLayout, Tensor], BucketReduce],
        local: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters = local or parameters
        ranges = [shard_range(r, world_size(), shards) for r in range(world_size())]
        subtrees = [covering_subtrees(own) for own in ranges]
        self.own_shards = ranges[rank()]
        self._dtype = parameters[0].dtype
        self._slots = {node: slot for slot, node in enumerate(subtrees[rank()])}
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, Node], tuple[Tensor, torch.cuda.Event | None]] = {}
        self._buckets = []
        for indices in buckets_of(parameters, bucket_bytes, first_bucket_bytes=_FIRST_BUCKET_BYTES):
            layout: BucketLayout = ReplicatedBucket({index: parameters[index] for index in indices})
            if local:
                layout = ShardedBucket({index: BlockPartition(parameters[index], shards=shards) for index in indices})
            bucket_reduce = open_bucket_reduce(subtrees, layout, parameters[0])
            self._buckets.append(_Bucket(indices, layout, bucket_reduce, expected=len(indices) * len(self._slots)))
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.indices}
        self._full = self._started = self._micro_step = 0

    def add_gradient(self, shard: int, index: int, gradient: Tensor) -> None:
        """Add shard `shard`'s gradient of parameter `index`, which is not modified. Thread-safe.

        Call it once per micro-step for each own shard and parameter.
        """
        self._add(Node(shard, 1), index, gradient)

    def add_gradients(self, shards: range, gradients: Mapping[int, Sequence[Tensor]]) -> None:
        """Add the gradients of some consecutive shards, by parameter index; the same sums as `add_gradient`, in fewer calls."""
        for node in covering_subtrees(shards):
            offset = node.first - shards.start
            of_shards = [[of_index[offset + n] for of_index in gradients.values()] for n in range(node.size)]
            size = 1
            # Up to two halves: their sum is written where it is needed.
            while len(of_shards) > 2:
                of_shards, size = self._sums_of_pairs(of_shards, owned=size > 1), 2 * size
            for number, sums in enumerate(of_shards):
                for index, tensor in zip(gradients, sums, strict=True):
                    self._add(Node(node.first + number * size, size), index, tensor)

    def _sums_of_pairs(self, of_nodes: list[list[Tensor]], *, owned: bool) -> list[list[Tensor]]:
        """Add the tensors of each second node to those of the one before it, in place if they are `owned`."""
        firsts = [tensor for tensors in of_nodes[::2] for tensor in tensors]
        seconds = [tensor for tensors in of_nodes[1::2] for tensor in tensors]
        if not owned:
            wide = [torch.empty_like(tensor, dtype=self._dtype) for tensor in firsts]
            torch._foreach_copy_(wide, firsts)
            firsts = wide
        torch._foreach_add_(firsts, seconds)
        count = len(of_nodes[0])
        return [firsts[start : start + count] for start in range(0, len(firsts), count)]

    def _add(self, node: Node, index: int, total: Tensor) -> None:
        """Add the sum of a subtree, as far up the tree as this rank can."""
        bucket = self._bucket_of[index]
        owned = node.size > 1  # the shards' gradients are not ours to overwrite
        while node not in self._slots:
            with self._lock:
                sibling = self._partial.pop((index, node.sibling), None)
                if sibling is None:
                    # Its sibling may be added to it on another stream.
                    written = torch.cuda.current_stream().record_event() if total.is_cuda else None
                    self._partial[index, node] = total, written
                    return
            other, written = sibling
            if written:
                torch.cuda.current_stream().wait_event(written)
            node = node.parent
            if node in self._slots:
                bucket.layout.write_sum(bucket.reduce.subtree_sum(self._slots[node]), index, total, other)
                break
            if owned:
                total += other
            else:
                total, owned = add(total, other, torch.empty_like(total, dtype=self._dtype)), True
        else:
            bucket.layout.write(bucket.reduce.subtree_sum(self._slots[node]), index, total)
        with self._lock:
            bucket.pending -= 1
            while self._full < len(self._buckets) and not self._buckets[self._full].pending:
                self._full += 1

    def start_full_buckets(self) -> None:
        """Start the communication of every full bucket. Call it only at a barrier of all shards on all ranks: thread timing
        decides when a bucket fills, but collectives need the same order on all ranks."""
        for bucket in self._buckets[self._started : self._full]:
            bucket.reduce.start()
        self._started = self._full

    def finish_micro_step(self, *, last: bool) -> None:
        """Complete the sums after the backward pass of a micro-step.

        After the `last` micro-step of a step, every `.grad` is the sum over shards and over micro-steps, in their order.

        Raises:
            RuntimeError: a rank was lost.
        """
        assert self._full == len(self._buckets), "a gradient is missing"
        self.start_full_buckets()
        for bucket in self._buckets:
            bucket.reduce.reduce(first=not self._micro_step)
        for bucket in self._buckets:
            bucket.reduce.wait(last=last)
            bucket.pending = bucket.expected
            if last:
                for index, gradient in bucket.layout.gradients(bucket.reduce.total).items():
                    self.parameters[index].grad = gradient
        self._full = self._started = 0
        self._micro_step = 0 if last else self._micro_step + 1


@dataclass
class _Bucket:
    """The gradients of some parameters; `pending` counts the sums over this rank's subtrees that are not written yet."""

    indices: list[int]
    layout: BucketLayout
    reduce: BucketReduce
    expected: int

    def __post_init__(self) -> None:
        self.pending = self.expected
