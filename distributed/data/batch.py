"""What the pipeline hands to the training loop."""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


class Mixed(NamedTuple):
    """The second labels of mixed images, int64 [n], and the part of the first that they kept, in [0, 1], [n]."""

    labels: Tensor
    own_part: Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's part of a micro-batch: one shard of it or several, any of which may be empty.

    images: [n, 3, 32, 32], normalized; labels: int64 [n]; sample_ids: int64 [n], numbers in the training set;
    sample_keys: int64 [n, 2], by which dropout draws; step_size: images of the whole step, over all of its
    micro-batches and ranks, by which a sum of losses becomes the step's mean; shard_sizes: images of each shard; mixed:
    what of other images is in these.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    sample_keys: Tensor
    step_size: int
    shard_sizes: tuple[int, ...]
    mixed: Mixed | None = None

    def shards(self) -> list["Batch"]:
        """Each shard as a batch of its own, its images in memory of its own: some libraries' sums depend on how their input
        is aligned, and a part's place in the whole depends on the ranks."""
        ends = list(accumulate(self.shard_sizes))
        parts = [slice(end - size, end) for end, size in zip(ends, self.shard_sizes, strict=True)]
        return [
            Batch(
                self.images[part].clone(), self.labels[part], self.sample_ids[part], self.sample_keys[part],
                self.step_size, (part.stop - part.start,), self.mixed and Mixed(*[tensor[part] for tensor in self.mixed]),
            )
            for part in parts
        ]  # fmt: skip
