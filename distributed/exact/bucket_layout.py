"""How the gradients of a bucket lie in one flat run of numbers that the ranks sum up chunk by chunk."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distributed.comm.collectives import rank, world_size
from distributed.exact.partition import ALIGNED, BlockPartition


class BucketLayout(Protocol):
    length: int
    chunks: list[slice]
    """What each rank sums up to the root."""

    def put(self, flat: Tensor, index: int, gradient: Tensor) -> None:
        """Write the gradient of parameter `index` into its place."""

    def write_sum(self, flat: Tensor, index: int, a: Tensor, b: Tensor) -> None:
        """Write a + b there; a may be used up."""

    def gradients(self, total: Tensor) -> Mapping[int, Tensor]:
        """What the optimizer of this rank is given, by the parameters' indices: parts of the sums' memory."""


class ReplicatedBucket:
    """Whole gradients, each in its parameter's memory layout; every rank is given all.

    Each begins at a multiple of `ALIGNED` numbers, as in `ByRank`: CUDA's norms take another path where memory is not aligned.
    """

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        self._parameters = parameters
        self.length = sum(map(_aligned, map(torch.numel, parameters.values())))
        size = world_size()
        self.chunks = [slice(r * self.length // size, (r + 1) * self.length // size) for r in range(size)]
        self._seen: dict[int, Mapping[int, Tensor]] = {}

    def put(self, flat: Tensor, index: int, gradient: Tensor) -> None:
        self._views(flat)[index].copy_(gradient)

    def write_sum(self, flat: Tensor, index: int, a: Tensor, b: Tensor) -> None:
        add(a, b, self._views(flat)[index])

    def gradients(self, total: Tensor) -> Mapping[int, Tensor]:
        return self._views(total)

    def _views(self, flat: Tensor) -> Mapping[int, Tensor]:
        """Made once for each of the few runs of numbers that there are."""
        if flat.data_ptr() not in self._seen:
            views, offset = {}, flat.storage_offset()
            for index, parameter in self._parameters.items():
                views[index] = flat.as_strided(parameter.shape, parameter.stride(), offset)
                offset += _aligned(parameter.numel())
            self._seen[flat.data_ptr()] = views
        return self._seen[flat.data_ptr()]


class ShardedBucket:
    """First all that is rank 0's of each gradient, then all of rank 1, and so on; a rank is given what is its own."""

    def __init__(self, blocks: Mapping[int, BlockPartition]) -> None:
        self._blocks = blocks
        self._places: list[dict[int, slice]] = []
        self.chunks: list[slice] = []
        offset = 0
        for r in range(world_size()):
            first, places = offset, {}
            for index, cut in blocks.items():
                length = cut.runs[r].stop - cut.runs[r].start
                places[index] = slice(offset, offset + length)
                offset += _aligned(length)
            self._places.append(places)
            self.chunks.append(slice(first, offset))
        self.length = offset

    def put(self, flat: Tensor, index: int, gradient: Tensor) -> None:
        cut = self._blocks[index]
        numbers = cut.flat(gradient)
        for places, run in zip(self._places, cut.runs, strict=True):
            flat[places[index]] = numbers[run]

    def write_sum(self, flat: Tensor, index: int, a: Tensor, b: Tensor) -> None:
        self.put(flat, index, add(a, b, a if a.dtype == flat.dtype else torch.empty_like(a, dtype=flat.dtype)))

    def gradients(self, total: Tensor) -> Mapping[int, Tensor]:
        """`total` has this rank's chunk alone."""
        first = self.chunks[rank()].start
        own = self._places[rank()]
        return {index: total[place.start - first : place.stop - first] for index, place in own.items()}


def _aligned(length: int) -> int:
    """The next multiple of `ALIGNED`."""
    return -(-length // ALIGNED) * ALIGNED


def add(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a + b in the type of `out`, which may be a: gradients of low precision are added up in that of the weights."""
    return torch.add(a, b, out=out) if a.dtype == out.dtype else out.copy_(a).add_(b)


def buckets_of(parameters: Sequence[Tensor], bucket_bytes: int, *, first_bucket_bytes: int) -> list[list[int]]:
    """The parameters of each bucket, last first: gradients come in the opposite order of the parameters."""
    buckets: list[list[int]] = [[]]
    held, limit = 0, first_bucket_bytes
    for index in reversed(range(len(parameters))):
        if held >= limit:
            buckets.append([])
            held, limit = 0, bucket_bytes
        buckets[-1].append(index)
        held += parameters[index].nbytes
    return buckets
