"""The ways for sums over subtrees to the root: none, through the memory of one host, over a process group."""

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distributed.collectives import rank, world_size
from distributed.exact.lanes import prepare_thread
from distributed.exact.reduction import Exchange, Nodes
from distributed.shared_memory import Signals, open_shared_memory, tensor_in
from distributed.tree import Node, root_of

_WRITTEN, _REDUCED = range(2)


class ExchangeOpener:
    """Opens the fastest exchange for these ranks; called by all ranks alike."""

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._group: Any = None
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, nodes: Nodes, length: int, like: Tensor) -> Exchange:
        if world_size() == 1:
            return Alone(length, like)
        memory = open_shared_memory(ThroughMemory.size(nodes, length, like), like.device)
        if memory is not None:
            return ThroughMemory(memory, nodes, length, like, timeout_seconds=self._timeout)
        if self._thread is None:
            # A group of its own: batch norm's exchanges run beside these, in no fixed order to them.
            self._group = dist.new_group()
            self._thread = ThreadPoolExecutor(1, "reduction", prepare_thread, (like.device,))
        return OverGroup(self._group, self._thread, nodes, length, like)


class Alone:
    """A single process: its one subtree is the tree."""

    def __init__(self, length: int, like: Tensor) -> None:
        self.sums = like.new_zeros(1, length)
        self.total = like.new_zeros(length)

    def send(self) -> None:
        pass

    def reduce(self, *, first: bool) -> None:
        _take_in(self.total, self.sums[0], first=first)

    def complete(self, *, last: bool) -> None:
        pass


class ThroughMemory:
    """Every rank writes its sums where all see them, adds up its chunk of everybody's, and writes that there too."""

    def __init__(self, memory: mmap.mmap, nodes: Nodes, length: int, like: Tensor, *, timeout_seconds: float) -> None:
        self._signals = Signals(memory, 0, kinds=2, timeout_seconds=timeout_seconds)
        row, offset = _row_bytes(length, like), Signals.size(2)
        self._chunk = slice(rank() * length // world_size(), (rank() + 1) * length // world_size())
        self._of_nodes: dict[Node, Tensor] = {}
        for r, own in enumerate(nodes):
            sums = tensor_in(memory, offset, (len(own), row // like.element_size()), like.dtype)[:, :length]
            self._of_nodes |= {node: of_node[self._chunk] for node, of_node in zip(own, sums, strict=True)}
            if r == rank():
                self.sums = sums
            offset += len(own) * row
        self.total = tensor_in(memory, offset, (length,), like.dtype)
        self._exchange = 0

    @staticmethod
    def size(nodes: Nodes, length: int, like: Tensor) -> int:
        """Bytes of memory that it needs."""
        return Signals.size(2) + (sum(map(len, nodes)) + 1) * _row_bytes(length, like)

    def send(self) -> None:
        self._exchange += 1
        self._signals.give(_WRITTEN, self._exchange)

    def reduce(self, *, first: bool) -> None:
        self._signals.wait(_WRITTEN, self._exchange)
        _take_in(self.total[self._chunk], root_of(self._of_nodes), first=first)
        self._signals.give(_REDUCED, self._exchange)

    def complete(self, *, last: bool) -> None:
        # Nobody writes into the total before all have come here with the next sums, so it can be read until then.
        self._signals.wait(_REDUCED, self._exchange)


class OverGroup:
    """All-to-all of chunks, while the backward pass goes on; an all-gather after a step's last micro-step.

    Args:
        thread: one, shared by all exchanges, so that their order is that of `send`.
    """

    def __init__(self, group: Any, thread: ThreadPoolExecutor, nodes: Nodes, length: int, like: Tensor) -> None:
        self._group, self._thread = group, thread
        # What comes in when every rank hands over the sum of its n-th subtree, if it has so many.
        self._incoming = [
            [(r, own[n]) for r, own in enumerate(nodes) if len(own) > n] for n in range(max(map(len, nodes)))
        ]
        self._chunk = -(-length // world_size())
        self.sums = like.new_zeros(len(nodes[rank()]), self._chunk * world_size())
        self.total = like.new_zeros(self._chunk * world_size())
        self._received: Future[dict[Node, Tensor]]

    def send(self) -> None:
        self._received = self._thread.submit(self._all_to_all)

    def reduce(self, *, first: bool) -> None:
        _take_in(self._own_chunk(), root_of(self._received.result()), first=first)

    def complete(self, *, last: bool) -> None:
        if last:
            dist.all_gather_into_tensor(self.total, self._own_chunk().clone(), group=self._group)

    def _own_chunk(self) -> Tensor:
        return self.total.view(-1, self._chunk)[rank()]

    def _all_to_all(self) -> dict[Node, Tensor]:
        received: dict[Node, Tensor] = {}
        for slot, senders in enumerate(self._incoming):
            sends = slot < len(self.sums)
            chunks = self.sums.new_empty(len(senders), self._chunk)
            of_senders = {r: self._chunk for r, _ in senders}
            dist.all_to_all_single(
                chunks.view(-1),
                self.sums[slot] if sends else self.sums.new_empty(0),
                output_split_sizes=[of_senders.get(r, 0) for r in range(world_size())],
                input_split_sizes=[self._chunk if sends else 0] * world_size(),
                group=self._group,
            )
            received.update(zip([node for _, node in senders], chunks, strict=True))
        return received


def _row_bytes(length: int, like: Tensor) -> int:
    """Up to the next cache line, so that every row begins where one does."""
    return -(-length * like.element_size() // 64) * 64


def _take_in(total: Tensor, summed: Tensor, *, first: bool) -> None:
    """Micro-steps are added up in their order."""
    if first:
        total.copy_(summed)
    else:
        total += summed
