"""Ways to reduce subtree sums to the root: within one process, through the memory of one host, over a process group."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.comm.collectives import all_gather, rank, world_size
from distributed.comm.reduction_tree import Node, reduce_to_root
from distributed.comm.shared_memory import SharedCounters, SharedMemory, open_shared_memory, row_bytes, tensor_in
from distributed.exact.bucket_layout import BucketLayout, ShardedBucket
from distributed.exact.gradient_reducer import BucketReduce, SubtreesOfRanks

_WRITTEN, _REDUCED = range(2)


class BucketReduceOpener:
    """Opens the fastest `BucketReduce` available to these ranks; a collective."""

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds

    def __call__(self, subtrees: SubtreesOfRanks, layout: BucketLayout, like: Tensor) -> BucketReduce:
        if world_size() == 1:
            return LocalReduce(layout.length, like)
        if isinstance(layout, ShardedBucket):
            return ReduceScatter(subtrees, layout, like)
        memory = open_shared_memory(SharedMemoryReduce.size(subtrees, layout.length, like), like.device)
        if memory is None:
            return AllReduce(subtrees, layout, like)
        return SharedMemoryReduce(memory, subtrees, layout, like, timeout_seconds=self._timeout)


class LocalReduce:
    """For a single process, whose one subtree is the entire tree: a `BucketReduce`.

    The first micro-step of a step writes its sums to the total, without a copy.
    """

    def __init__(self, length: int, like: Tensor) -> None:
        self.total = like.new_zeros(length)
        self._later_sums: Tensor | None = None
        self._is_first = True

    def subtree_sum(self, slot: int) -> Tensor:
        if self._is_first:
            return self.total
        if self._later_sums is None:
            self._later_sums = torch.zeros_like(self.total)
        return self._later_sums

    def start(self) -> None:
        pass

    def reduce(self, *, first: bool) -> None:
        if not first:
            self.total += self.subtree_sum(0)

    def wait(self, *, last: bool) -> None:
        self._is_first = last


class SharedMemoryReduce:
    """Through shared memory: a `BucketReduce`. Each rank writes its subtree sums there, reduces its chunk of all ranks' sums,
    and writes the result there too."""

    def __init__(
        self,
        memory: SharedMemory,
        subtrees: SubtreesOfRanks,
        layout: BucketLayout,
        like: Tensor,
        *,
        timeout_seconds: float,
    ) -> None:
        length, self._chunk = layout.length, layout.chunks[rank()]
        self._counters = SharedCounters(memory, count=2, timeout_seconds=timeout_seconds)
        row, offset = row_bytes(length, like.dtype), SharedCounters.size(2)
        self._chunk_of_node: dict[Node, Tensor] = {}
        for r, own in enumerate(subtrees):
            sums = tensor_in(memory, offset, (len(own), row // like.element_size()), like.dtype)[:, :length]
            self._chunk_of_node |= {node: node_sum[self._chunk] for node, node_sum in zip(own, sums, strict=True)}
            if r == rank():
                self._sums = sums
            offset += len(own) * row
        self.total = tensor_in(memory, offset, (length,), like.dtype)
        self._count = 0

    def subtree_sum(self, slot: int) -> Tensor:
        return self._sums[slot]

    @staticmethod
    def size(subtrees: SubtreesOfRanks, length: int, like: Tensor) -> int:
        """Return the number of bytes of shared memory needed."""
        return SharedCounters.size(2) + (sum(map(len, subtrees)) + 1) * row_bytes(length, like.dtype)

    def start(self) -> None:
        self._count += 1
        self._counters.publish(_WRITTEN, self._count)

    def reduce(self, *, first: bool) -> None:
        self._counters.wait(_WRITTEN, self._count)
        _accumulate(self.total[self._chunk], self._chunk_of_node, first=first)
        self._counters.publish(_REDUCED, self._count)

    def wait(self, *, last: bool) -> None:
        # The total can be read until the next `reduce`, which waits until every rank has written its next sums.
        self._counters.wait(_REDUCED, self._count)


class ReduceScatter:
    """Over the process group: a `BucketReduce`. An all-to-all of chunks overlaps with the backward pass; each rank keeps the
    total of its own chunk. Subtree sums use memory only from the first to the last gradient of a bucket.

    Uses the default process group, like everything in exact mode: NCCL may deadlock if two communicators are in use at once
    (https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.new_group).
    """

    _keeps_sums = False

    def __init__(self, subtrees: SubtreesOfRanks, layout: BucketLayout, like: Tensor) -> None:
        self._like = like
        # In round n every rank sends the sum of its n-th subtree, if it has that many: (sender, subtree) by round.
        self._rounds = [
            [(r, own[n]) for r, own in enumerate(subtrees) if len(own) > n] for n in range(max(map(len, subtrees)))
        ]
        self._slots, self._length = len(subtrees[rank()]), layout.length
        self._sizes = [chunk.stop - chunk.start for chunk in layout.chunks]
        self._sums = self._new_sums() if self._keeps_sums else None
        self._allocating = threading.Lock()
        self.total = self._new_total()
        self._received: dict[Node, Tensor] = {}
        self._works: list[Any] = []

    def _new_total(self) -> Tensor:
        return self._like.new_zeros(self._sizes[rank()])

    def _new_sums(self) -> Tensor:
        return self._like.new_zeros(self._slots, self._length)

    def subtree_sum(self, slot: int) -> Tensor:
        with self._allocating:
            if self._sums is None:
                self._sums = self._new_sums()
            return self._sums[slot]

    def reduce(self, *, first: bool) -> None:
        for work in self._works:
            work.wait()
        _accumulate(self._own_total(), self._received, first=first)
        self._received, self._works = {}, []

    def wait(self, *, last: bool) -> None:
        pass

    def _own_total(self) -> Tensor:
        return self.total

    def start(self) -> None:
        sums = self._sums
        assert sums is not None
        if not self._keeps_sums:
            self._sums = None
        own_size = self._sizes[rank()]
        for slot, senders in enumerate(self._rounds):
            sends = slot < self._slots
            chunks = sums.new_empty(len(senders), own_size)
            sender_ranks = {r for r, _ in senders}
            work = dist.all_to_all_single(
                chunks.view(-1),
                sums[slot] if sends else sums.new_empty(0),
                output_split_sizes=[own_size if r in sender_ranks else 0 for r in range(world_size())],
                input_split_sizes=self._sizes if sends else [0] * world_size(),
                async_op=True,
            )
            self._works.append(work)
            self._received.update(zip([node for _, node in senders], chunks, strict=True))


class AllReduce(ReduceScatter):
    """A `ReduceScatter` followed by an all-gather after the last micro-step of a step: every rank has the full total.

    Keeps its subtree sums: shards write to them from streams that do not wait for each other, and gradients are views of them.
    """

    _keeps_sums = True

    def _new_total(self) -> Tensor:
        return self._like.new_zeros(self._length)

    def _own_total(self) -> Tensor:
        first = sum(self._sizes[: rank()])
        return self.total[first : first + self._sizes[rank()]]

    def wait(self, *, last: bool) -> None:
        if last:
            own, max_size = self._own_total(), max(self._sizes)
            received = own.new_empty(world_size(), max_size)
            sent = own.new_zeros(max_size)
            sent[: len(own)] = own
            all_gather(received.view(-1), sent)
            torch.cat([row[:size] for row, size in zip(received, self._sizes, strict=True)], out=self.total)


def _accumulate(total: Tensor, sums: Mapping[Node, Tensor], *, first: bool) -> None:
    """Add a micro-step's tree sum to the total; if `first`, overwrite it. Micro-steps are added in their order."""
    if first:
        reduce_to_root(sums, out=total)
    else:
        total += reduce_to_root(sums)
