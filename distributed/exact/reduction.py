"""Gradients of all shards summed in one tree, with no more traffic than a ring all-reduce.

Each rank adds up its own shards' gradients as they come, as far as the tree lets it; all-to-all hands every rank its
chunk of everybody's sums; it finishes the tree over its chunk; an all-gather gives all chunks to all. Buckets go out in
a fixed order while the backward pass goes on. How the numbers are cut into buckets and chunks does not touch the sums.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.collectives import rank, world_size
from distributed.tree import Node, largest_nodes, leaves_of, root_of

_FIRST_BUCKET_BYTES = 2**20  # small, so that the exchange begins early, as in DistributedDataParallel


class TreeReduction:
    """The sum over `shards` shards of the gradients of some parameters; collective, all ranks alike.

    Args:
        parameters: all of one dtype and device.
        shards: of all ranks together; this rank holds `leaves_of(rank, world_size, shards)`.
    """

    def __init__(self, parameters: Sequence[Tensor], *, shards: int, bucket_bytes: int) -> None:
        self.parameters = parameters
        self.own = leaves_of(rank(), world_size(), shards)
        self._nodes = {node: slot for slot, node in enumerate(largest_nodes(self.own))}
        self._lock = threading.Lock()
        self._partial: dict[tuple[int, Node], Tensor] = {}
        self._buckets: list[_Bucket] = []
        self._place: dict[int, tuple[_Bucket, list[Tensor]]] = {}
        # Gradients come in the opposite order of the parameters.
        sizes = [_FIRST_BUCKET_BYTES, *[bucket_bytes] * len(parameters)]
        chosen: list[int] = []
        for index in reversed(range(len(parameters))):
            chosen.append(index)
            full = sum(parameters[i].nbytes for i in chosen) >= sizes[len(self._buckets)]
            if full or index == 0:
                self._open_bucket(chosen, shards)
                chosen = []
        # A group of its own: batch norm's exchanges run beside these, in no fixed order to them.
        self._group = dist.new_group() if world_size() > 1 else None
        self._thread = ThreadPoolExecutor(1, "reduction", initializer=torch.set_num_threads, initargs=(1,))
        self._sent: list[Future[None]] = []
        self._micro_step = 0

    def _open_bucket(self, chosen: list[int], shards: int) -> None:
        bucket = _Bucket([self.parameters[i] for i in chosen], own_nodes=len(self._nodes), shards=shards)
        self._buckets.append(bucket)
        for place, index in enumerate(chosen):
            self._place[index] = bucket, bucket.views[place]

    def take(self, shard: int, index: int, gradient: Tensor) -> None:
        """Shard `shard` of all has this gradient of parameter `index`; used up. From any thread, once a micro-step each."""
        bucket, places = self._place[index]
        node, total = Node(shard, 1), gradient
        while node not in self._nodes:
            with self._lock:
                other = self._partial.pop((index, node.sibling), None)
                if other is None:
                    self._partial[index, node] = total
                    return
            node = node.parent
            if node in self._nodes:
                torch.add(total, other, out=places[self._nodes[node]])
            else:
                total = total.add_(other)
        if node.size == 1:
            places[self._nodes[node]].copy_(gradient)
        with self._lock:
            bucket.missing -= 1
            while len(self._sent) < len(self._buckets) and not self._buckets[len(self._sent)].missing:
                ready = self._buckets[len(self._sent)]
                self._sent.append(self._thread.submit(ready.reduce, self._group, self._micro_step))

    def finish(self, *, last: bool) -> None:
        """After the backward pass of a micro-step; after the last of a step every `grad` is the sum over shards, of the
        micro-steps in their order.

        Raises:
            RuntimeError: a parameter had no gradient; or a rank was lost.
        """
        if len(self._sent) < len(self._buckets):
            count = sum(bucket.missing for bucket in self._buckets)
            raise RuntimeError(f"{count} gradients did not come: exact mode needs every parameter in every forward pass")
        if last:
            self._sent += [self._thread.submit(bucket.gather, self._group) for bucket in self._buckets]
        for sent in self._sent:
            sent.result()
        if last:
            for index, parameter in enumerate(self.parameters):
                bucket, _ = self._place[index]
                parameter.grad = bucket.gradients[id(parameter)]
        for bucket in self._buckets:
            bucket.missing = bucket.expected
        self._sent, self._micro_step = [], 0 if last else self._micro_step + 1


class _Bucket:
    """Some parameters' gradients side by side, once for each subtree that this rank adds up by itself."""

    def __init__(self, parameters: list[Tensor], *, own_nodes: int, shards: int) -> None:
        ranks = range(world_size())
        nodes = [largest_nodes(leaves_of(r, len(ranks), shards)) for r in ranks]
        # What comes in when every rank hands over the sum of its n-th subtree, if it has so many.
        self._incoming = [
            [(r, nodes[r][n]) for r in ranks if len(nodes[r]) > n] for n in range(max(map(len, nodes)))
        ]
        length = sum(parameter.numel() for parameter in parameters)
        self._chunk = -(-length // len(ranks))
        blank: dict[str, Any] = {"dtype": parameters[0].dtype, "device": parameters[0].device}
        self._sums = torch.zeros(own_nodes, self._chunk * len(ranks), **blank)
        self._total = torch.zeros(self._chunk * len(ranks), **blank)
        self.views = list(zip(*[_views(parameters, row) for row in self._sums], strict=True))
        self.gradients = dict(zip(map(id, parameters), _views(parameters, self._total), strict=True))
        self.expected = self.missing = len(parameters) * own_nodes

    def reduce(self, group: Any, micro_step: int) -> None:
        """Finish the tree over this rank's chunk and add it to those of the micro-steps before."""
        chunk = self._total.view(-1, self._chunk)[rank()]
        total = root_of(self._exchange(group)) if world_size() > 1 else self._sums[0]
        if micro_step:
            chunk += total
        else:
            chunk.copy_(total)

    def _exchange(self, group: Any) -> dict[Node, Tensor]:
        received: dict[Node, Tensor] = {}
        for slot, senders in enumerate(self._incoming):
            sends = slot < len(self._sums)
            mine = self._sums[slot] if sends else self._sums.new_empty(0)
            out = self._sums.new_empty(len(senders), self._chunk)
            of_senders = {r: self._chunk for r, _ in senders}
            dist.all_to_all_single(
                out.view(-1),
                mine,
                output_split_sizes=[of_senders.get(r, 0) for r in range(world_size())],
                input_split_sizes=[self._chunk if sends else 0] * world_size(),
                group=group,
            )
            received.update(zip([node for _, node in senders], out, strict=True))
        return received

    def gather(self, group: Any) -> None:
        if world_size() > 1:
            dist.all_gather_into_tensor(self._total, self._total.view(-1, self._chunk)[rank()].clone(), group=group)


def _views(parameters: list[Tensor], flat: Tensor) -> list[Tensor]:
    """The parameters' gradients as parts of a flat tensor, each in its parameter's memory layout."""
    views, offset = [], 0
    for parameter in parameters:
        part = flat[offset : offset + parameter.numel()]
        views.append(part.as_strided(parameter.shape, parameter.stride(), part.storage_offset()))
        offset += parameter.numel()
    return views
