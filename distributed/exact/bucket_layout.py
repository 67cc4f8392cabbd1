"""How the gradients of a bucket are laid out in one flat buffer, which the ranks sum chunk by chunk."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distributed.comm.collectives import rank, world_size
from distributed.exact.partition import ALIGNMENT, BlockPartition


class BucketLayout(Protocol):
    """Where each gradient of a bucket is in its flat buffer."""

    length: int
    """Elements of the buffer."""
    chunks: list[slice]
    """The elements that each rank sums up to the root of the tree."""

    def write(self, flat: Tensor, index: int, gradient: Tensor) -> None:
        """Write the gradient of parameter `index`."""

    def write_sum(self, flat: Tensor, index: int, a: Tensor, b: Tensor) -> None:
        """Write a + b as the gradient of parameter `index`."""

    def gradients(self, total: Tensor) -> Mapping[int, Tensor]:
        """Return the gradients that this rank's optimizer needs, by parameter index: views of the summed buffer."""


class ReplicatedBucket:
    """Full gradients, each in its parameter's memory layout; every rank receives all of them.

    Each begins at a multiple of `ALIGNMENT` elements, as in `ShardedBucket`: CUDA's norm kernels take another code path for
    unaligned memory, which changes bits.
    """

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        self._parameters = parameters
        self.length = sum(map(_aligned, map(torch.numel, parameters.values())))
        size = world_size()
        self.chunks = [slice(r * self.length // size, (r + 1) * self.length // size) for r in range(size)]
        self._views_of_buffer: dict[int, Mapping[int, Tensor]] = {}

    def write(self, flat: Tensor, index: int, gradient: Tensor) -> None:
        self._views(flat)[index].copy_(gradient)

    def write_sum(self, flat: Tensor, index: int, a: Tensor, b: Tensor) -> None:
        add(a, b, self._views(flat)[index])

    def gradients(self, total: Tensor) -> Mapping[int, Tensor]:
        return self._views(total)

    def _views(self, flat: Tensor) -> Mapping[int, Tensor]:
        """Return one view per parameter; cached, since there are only a few buffers."""
        if flat.data_ptr() not in self._views_of_buffer:
            views, offset = {}, flat.storage_offset()
            for index, parameter in self._parameters.items():
                views[index] = flat.as_strided(parameter.shape, parameter.stride(), offset)
                offset += _aligned(parameter.numel())
            self._views_of_buffer[flat.data_ptr()] = views
        return self._views_of_buffer[flat.data_ptr()]


class ShardedBucket:
    """Rank 0's part of every gradient, then rank 1's, and so on; each rank receives its own chunk."""

    def __init__(self, partitions: Mapping[int, BlockPartition]) -> None:
        self._partitions = partitions
        self._slices_of_rank: list[dict[int, slice]] = []
        self.chunks: list[slice] = []
        offset = 0
        for r in range(world_size()):
            first, slices = offset, {}
            for index, partition in partitions.items():
                length = partition.ranges[r].stop - partition.ranges[r].start
                slices[index] = slice(offset, offset + length)
                offset += _aligned(length)
            self._slices_of_rank.append(slices)
            self.chunks.append(slice(first, offset))
        self.length = offset

    def write(self, flat: Tensor, index: int, gradient: Tensor) -> None:
        partition = self._partitions[index]
        elements = partition.flat(gradient)
        for slices, elements_of_rank in zip(self._slices_of_rank, partition.ranges, strict=True):
            flat[slices[index]] = elements[elements_of_rank]

    def write_sum(self, flat: Tensor, index: int, a: Tensor, b: Tensor) -> None:
        self.write(flat, index, add(a, b, torch.empty_like(a, dtype=flat.dtype)))

    def gradients(self, total: Tensor) -> Mapping[int, Tensor]:
        """Return this rank's gradients; `total` is this rank's chunk only."""
        first = self.chunks[rank()].start
        slices = self._slices_of_rank[rank()]
        return {index: total[place.start - first : place.stop - first] for index, place in slices.items()}


def _aligned(length: int) -> int:
    """Round up to a multiple of `ALIGNMENT`."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def add(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute a + b in the dtype of `out`: low-precision gradients are summed in the weights' dtype."""
    return torch.add(a, b, out=out) if a.dtype == out.dtype else out.copy_(a).add_(b)


def buckets_of(parameters: Sequence[Tensor], bucket_bytes: int, *, first_bucket_bytes: int) -> list[list[int]]:
    """Group parameter indices into buckets, last parameter first: the backward pass yields gradients in reverse order."""
    buckets: list[list[int]] = [[]]
    filled, limit = 0, first_bucket_bytes
    for index in reversed(range(len(parameters))):
        if filled >= limit:
            buckets.append([])
            filled, limit = 0, bucket_bytes
        buckets[-1].append(index)
        filled += parameters[index].nbytes
    return buckets
