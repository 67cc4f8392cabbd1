"""Weights in as many blocks as there are shards: results computed block by block are bit-identical at any world size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed.comm.collectives import all_gather, rank, world_size
from distributed.comm.reduction_tree import shard_range

ALIGNMENT = 16
"""Block lengths are multiples of this, except for a tensor's last block, so that vectorized loops and their scalar remainders
cover the same elements everywhere."""


class BlockPartition:
    """Partition of a tensor's elements, in memory order, into `shards` blocks; each rank has a contiguous range of them.

    Implements `engine.sharding.Placement`.
    """

    def __init__(self, like: Tensor, *, shards: int) -> None:
        self.shape, self.stride, self.numel = like.shape, like.stride(), like.numel()
        self.block_length = -(-self.numel // (shards * ALIGNMENT)) * ALIGNMENT
        blocks = [shard_range(r, world_size(), shards) for r in range(world_size())]
        self.ranges = [
            slice(*(min(block * self.block_length, self.numel) for block in (own.start, own.stop))) for own in blocks
        ]
        """The elements of each rank, in memory order."""
        self.max_length = max(map(len, blocks)) * self.block_length
        self.local_range = self.ranges[rank()]

    def local_part(self, full: Tensor) -> Tensor:
        return self.flat(full)[self.local_range]

    def gather(self, local: Tensor) -> Tensor:
        sent = local.new_zeros(self.max_length)
        sent[: len(local)] = local
        received = local.new_empty(world_size(), self.max_length)
        all_gather(received.view(-1), sent)
        flat = torch.cat([row[: own.stop - own.start] for row, own in zip(received, self.ranges, strict=True)])
        return flat.as_strided(self.shape, self.stride)

    def flat(self, full: Tensor) -> Tensor:
        """Return the elements of a tensor of this shape in memory order, [numel]."""
        if full.stride() != self.stride:
            full = full.new_empty_strided(self.shape, self.stride).copy_(full)
        return full.as_strided((self.numel,), (1,))


def squared_norms_of_blocks(
    tensors: Sequence[Tensor], partitions: Sequence[BlockPartition], *, shards: int, first: int
) -> Tensor:
    """Return the squared L2 norm of each block, [tensors, shards]; zero for blocks that this rank does not have.

    Args:
        tensors: flat, in memory order; all blocks of each tensor or a contiguous range of them.
        first: the index of the first block present.
    """
    found = [
        (index, first + offset, block)
        for index, (tensor, partition) in enumerate(zip(tensors, partitions, strict=True))
        for offset, block in enumerate(torch.split(tensor, partition.block_length) if len(tensor) else ())
    ]
    if not found:
        return tensors[0].new_zeros(len(tensors), shards)
    indices, block_indices, blocks = zip(*found, strict=True)
    norms = dict(zip(zip(indices, block_indices, strict=True), torch._foreach_norm(blocks), strict=True))
    # Stacked in order instead of written by index: indices would be copied from the host, which waits for the device.
    zero = tensors[0].new_zeros(())
    cells = [norms.get((index, block), zero) for index in range(len(tensors)) for block in range(shards)]
    return torch.stack(cells).square().view(len(tensors), shards)
