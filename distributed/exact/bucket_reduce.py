"""The ways for sums over subtrees to the root: none, through the memory of one host, over a process group."""

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.comm.collectives import all_gather, rank, world_size
from distributed.comm.reduction_tree import Node, reduce_to_root
from distributed.comm.shared_memory import SharedCounters, SharedMemory, open_shared_memory, tensor_in
from distributed.exact.bucket_layout import BucketLayout, ShardedBucket
from distributed.exact.gradient_reducer import BucketReduce, Nodes

_WRITTEN, _REDUCED = range(2)


class BucketReduceOpener:
    """Opens the fastest exchange for these ranks; called by all ranks alike."""

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds

    def __call__(self, nodes: Nodes, lie: BucketLayout, like: Tensor) -> BucketReduce:
        if world_size() == 1:
            return LocalReduce(lie.length, like)
        if not isinstance(lie, ShardedBucket):
            memory = open_shared_memory(SharedMemoryReduce.size(nodes, lie.length, like), like.device)
            if memory is not None:
                return SharedMemoryReduce(memory, nodes, lie, like, timeout_seconds=self._timeout)
        return (ReduceScatter if isinstance(lie, ShardedBucket) else AllReduce)(nodes, lie, like)


class LocalReduce:
    """A single process: its one subtree is the tree."""

    def __init__(self, length: int, like: Tensor) -> None:
        self._sums = like.new_zeros(length)
        self.total = like.new_zeros(length)

    def sums(self, slot: int) -> Tensor:
        return self._sums

    def send(self) -> None:
        pass

    def reduce(self, *, first: bool) -> None:
        _take_in(self.total, self._sums, first=first)

    def complete(self, *, last: bool) -> None:
        pass


class SharedMemoryReduce:
    """Every rank writes its sums where all see them, adds up its chunk of everybody's, and writes that there too."""

    def __init__(
        self, memory: SharedMemory, nodes: Nodes, lie: BucketLayout, like: Tensor, *, timeout_seconds: float
    ) -> None:
        length, self._chunk = lie.length, lie.chunks[rank()]
        self._counters = SharedCounters(memory, 0, count=2, timeout_seconds=timeout_seconds)
        row, offset = _row_bytes(length, like), SharedCounters.size(2)
        self._of_nodes: dict[Node, Tensor] = {}
        for r, own in enumerate(nodes):
            sums = tensor_in(memory, offset, (len(own), row // like.element_size()), like.dtype)[:, :length]
            self._of_nodes |= {node: of_node[self._chunk] for node, of_node in zip(own, sums, strict=True)}
            if r == rank():
                self._sums = sums
            offset += len(own) * row
        self.total = tensor_in(memory, offset, (length,), like.dtype)
        self._exchange = 0

    def sums(self, slot: int) -> Tensor:
        return self._sums[slot]

    @staticmethod
    def size(nodes: Nodes, length: int, like: Tensor) -> int:
        """Bytes of memory that it needs."""
        return SharedCounters.size(2) + (sum(map(len, nodes)) + 1) * _row_bytes(length, like)

    def send(self) -> None:
        self._exchange += 1
        self._counters.publish(_WRITTEN, self._exchange)

    def reduce(self, *, first: bool) -> None:
        self._counters.wait(_WRITTEN, self._exchange)
        _take_in(self.total[self._chunk], reduce_to_root(self._of_nodes), first=first)
        self._counters.publish(_REDUCED, self._exchange)

    def complete(self, *, last: bool) -> None:
        # Nobody writes into the total before all have come here with the next sums, so it can be read until then.
        self._counters.wait(_REDUCED, self._exchange)


class ReduceScatter:
    """All-to-all of chunks, while the backward pass goes on; each rank keeps the total of its own. What is not kept takes
    memory only from the first gradient of a bucket to the last.

    Over the default process group, as all else in exact mode: NCCL may deadlock where two communicators are in use at once
    (https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.new_group).
    """

    _keeps_sums = False

    def __init__(self, nodes: Nodes, lie: BucketLayout, like: Tensor) -> None:
        self._like = like
        # What comes in when every rank hands over the sum of its n-th subtree, if it has so many.
        self._incoming = [
            [(r, own[n]) for r, own in enumerate(nodes) if len(own) > n] for n in range(max(map(len, nodes)))
        ]
        self._slots, self._length = len(nodes[rank()]), lie.length
        self._sizes = [chunk.stop - chunk.start for chunk in lie.chunks]
        self._sums = self._new_sums() if self._keeps_sums else None
        self._allocating = threading.Lock()
        self.total = self._new_total()
        self._received: dict[Node, Tensor] = {}
        self._works: list[Any] = []

    def _new_total(self) -> Tensor:
        return self._like.new_zeros(self._sizes[rank()])

    def _new_sums(self) -> Tensor:
        return self._like.new_zeros(self._slots, self._length)

    def sums(self, slot: int) -> Tensor:
        with self._allocating:
            if self._sums is None:
                self._sums = self._new_sums()
            return self._sums[slot]

    def reduce(self, *, first: bool) -> None:
        for work in self._works:
            work.wait()
        _take_in(self._own_total(), reduce_to_root(self._received), first=first)
        self._received, self._works = {}, []

    def complete(self, *, last: bool) -> None:
        pass

    def _own_total(self) -> Tensor:
        return self.total

    def send(self) -> None:
        sums = self._sums
        assert sums is not None
        if not self._keeps_sums:
            self._sums = None
        own = self._sizes[rank()]
        for slot, senders in enumerate(self._incoming):
            sends = slot < self._slots
            chunks = sums.new_empty(len(senders), own)
            of_senders = {r: own for r, _ in senders}
            work = dist.all_to_all_single(
                chunks.view(-1),
                sums[slot] if sends else sums.new_empty(0),
                output_split_sizes=[of_senders.get(r, 0) for r in range(world_size())],
                input_split_sizes=self._sizes if sends else [0] * world_size(),
                async_op=True,
            )
            self._works.append(work)
            self._received.update(zip([node for _, node in senders], chunks, strict=True))


class AllReduce(ReduceScatter):
    """After a step's last micro-step an all-gather as well: every rank has the whole total.

    Keeps its sums: shards write to them from streams that do not wait for each other, and gradients are views of them.
    """

    _keeps_sums = True

    def _new_total(self) -> Tensor:
        self._most = max(self._sizes)
        return self._like.new_zeros(self._length)

    def _own_total(self) -> Tensor:
        first = sum(self._sizes[: rank()])
        return self.total[first : first + self._sizes[rank()]]

    def complete(self, *, last: bool) -> None:
        if last:
            own = self._own_total()
            received = own.new_empty(world_size(), self._most)
            sent = own.new_zeros(self._most)
            sent[: len(own)] = own
            all_gather(received.view(-1), sent)
            torch.cat([row[:size] for row, size in zip(received, self._sizes, strict=True)], out=self.total)


def _row_bytes(length: int, like: Tensor) -> int:
    """Up to the next cache line, so that every row begins where one does."""
    return -(-length * like.element_size() // 64) * 64


def _take_in(total: Tensor, summed: Tensor, *, first: bool) -> None:
    """Micro-steps are added up in their order."""
    if first:
        total.copy_(summed)
    else:
        total += summed
