"""Weights cut into as many blocks as there are shards, so that what is computed block by block has the same bits on any
number of ranks, whether a rank has all blocks or some."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed.comm.collectives import all_gather, rank, world_size
from distributed.comm.reduction_tree import shard_range

ALIGNED = 16
"""Every block but a tensor's last is a multiple of this: vector instructions and their leftovers fall on the same numbers."""


class BlockPartition:
    """How a tensor is cut: its numbers in the order of memory, in `shards` blocks, of which a rank holds a run.

    Has what `engine.placement.Placement` asks for.
    """

    def __init__(self, like: Tensor, *, shards: int) -> None:
        self.shape, self.stride, self.numel = like.shape, like.stride(), like.numel()
        self.length = -(-self.numel // (shards * ALIGNED)) * ALIGNED
        held = [shard_range(r, world_size(), shards) for r in range(world_size())]
        self.runs = [slice(*(min(block * self.length, self.numel) for block in (own.start, own.stop))) for own in held]
        self.most = max(map(len, held)) * self.length
        self.own = self.runs[rank()]

    def cut(self, whole: Tensor) -> Tensor:
        return self.flat(whole)[self.own]

    def whole(self, part: Tensor) -> Tensor:
        sent = part.new_zeros(self.most)
        sent[: len(part)] = part
        received = part.new_empty(world_size(), self.most)
        all_gather(received.view(-1), sent)
        flat = torch.cat([row[: run.stop - run.start] for row, run in zip(received, self.runs, strict=True)])
        return flat.as_strided(self.shape, self.stride)

    def flat(self, whole: Tensor) -> Tensor:
        """A tensor of this shape in the order of memory."""
        if whole.stride() != self.stride:
            whole = whole.new_empty_strided(self.shape, self.stride).copy_(whole)
        return whole.as_strided((self.numel,), (1,))


def squares_of_blocks(parts: Sequence[Tensor], blocks: Sequence[BlockPartition], *, shards: int, first: int) -> Tensor:
    """The squared L2 norm of each block, [tensors, shards]; zero where it is not here.

    Args:
        parts: of each tensor, in the order of memory, all of it or a run of blocks.
        first: the block that each part begins with.
    """
    found = [
        (tensor, first + place, block)
        for tensor, (part, cut) in enumerate(zip(parts, blocks, strict=True))
        for place, block in enumerate(torch.split(part, cut.length) if len(part) else ())
    ]
    if not found:
        return parts[0].new_zeros(len(parts), shards)
    tensors, places, numbers = zip(*found, strict=True)
    norms = dict(zip(zip(tensors, places, strict=True), torch._foreach_norm(numbers), strict=True))
    # Stacked in order, not written by index: indices would come from the host, and the device would be waited for.
    nothing = parts[0].new_zeros(())
    cells = [norms.get((tensor, block), nothing) for tensor in range(len(parts)) for block in range(shards)]
    return torch.stack(cells).square().view(len(parts), shards)
