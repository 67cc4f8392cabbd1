"""The batches that the pipeline hands to the training loop, and how they are sized and sharded."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.comm.reduction_tree import shard_range
from distributed.data.resize import resize_and_crop


@dataclass(frozen=True)
class Batching:
    """How many images make up a batch, over all ranks, and the seed of their order and augmentation."""

    seed: int
    global_batch_size: int
    grad_accum_steps: int
    evaluation_batch_size: int


@dataclass(frozen=True)
class Shards:
    """The number of shards of each micro-batch, and which of them this rank has."""

    total: int
    own: range

    @classmethod
    def of_rank(cls, rank: int, world_size: int, shards: int) -> "Shards":
        """Return a rank's share of the shards."""
        return cls(shards, shard_range(rank, world_size, shards))


@dataclass(frozen=True)
class InputFormat:
    """The device, type, memory layout, size and channels of the images in a batch.

    Attributes:
        resized_side: height and width in pixels: the shorter side is resized to it and the centre cropped; None: neither.
        repeats_channel: whether images of one channel become images of three equal ones.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    resized_side: int | None = None
    repeats_channel: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def converted(self, images: Tensor, *, side: int | None = None) -> Tensor:
        """Return normalized images [n, h, w, c] as the network's input, [n, c, h, w].

        Args:
            side: height and width of the result; by default `resized_side`.
        """
        if side := side or self.resized_side:
            images = resize_and_crop(images, side)
        images = images.permute(0, 3, 1, 2)
        if self.repeats_channel and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return images.contiguous(memory_format=self.memory_format)


class MicroBatch(NamedTuple):
    """A slice of an epoch's order, and this rank's shards of it.

    `start` and `stop` are positions in the order; `local` is relative to `start`. `global_count` is the number of images
    in the entire step, over all of its micro-batches and ranks.
    """

    start: int
    stop: int
    local: slice
    shard_sizes: tuple[int, ...]
    global_count: int

    @classmethod
    def of(cls, start: int, stop: int, shards: Shards, *, global_count: int) -> "MicroBatch":
        """Divide a slice of the order into shards whose sizes differ by at most one."""
        count, own = stop - start, shards.own
        bounds = [shard * count // shards.total for shard in range(own.start, own.stop + 1)]
        sizes = tuple(last - first for first, last in pairwise(bounds))
        return cls(start, stop, slice(bounds[0], bounds[-1]), sizes, global_count)

    def ids(self, order: Tensor) -> Tensor:
        """Return the ids of this rank's images, int64 [n]."""
        return order[self.start : self.stop][self.local]

    def partners(self, order: Tensor) -> Tensor:
        """Return the ids of the images to mix them with, int64 [n]: each one's predecessor in the micro-batch, on any rank."""
        return order[self.start : self.stop].roll(1)[self.local]


class Mixed(NamedTuple):
    """The second labels of mixed images, int64 [n], and the weight in [0, 1] of their own labels, [n]."""

    labels: Tensor
    own_weight: Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's shards of a micro-batch. A shard may be empty.

    images: [n, channels, h, w], normalized.
    labels: int64 [n].
    sample_ids: int64 [n], positions in the training set or, of the test split, in the test set.
    sample_keys: int64 [n, 2], keys of the samples' random draws, e.g. for dropout; [0, 2] in evaluation, which draws nothing.
    global_count: number of images in the step, over all micro-batches and ranks, or in the split that is evaluated. Dividing
        the sum of the losses by it gives the mean.
    shard_sizes: number of images in each shard.
    mixed: the labels of the images that these are mixed with, if they are.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    sample_keys: Tensor
    global_count: int
    shard_sizes: tuple[int, ...]
    mixed: Mixed | None = None

    def shards(self) -> list["Batch"]:
        """Return each shard as a batch with its images copied.

        The sums of some libraries depend on the alignment of their input, and a shard's offset in this batch depends on the
        number of ranks.
        """
        return [self.group(range(shard, shard + 1)) for shard in range(len(self.shard_sizes))]

    def group(self, shards: range) -> "Batch":
        """Return some consecutive shards as a batch, with its images copied."""
        ends = [0, *accumulate(self.shard_sizes)]
        own = slice(ends[shards.start], ends[shards.stop])
        return Batch(
            self.images[own].clone(), self.labels[own], self.sample_ids[own], self.sample_keys[own], self.global_count,
            self.shard_sizes[shards.start : shards.stop], self.mixed and Mixed(*[tensor[own] for tensor in self.mixed]),
        )  # fmt: skip
