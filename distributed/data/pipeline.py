"""The images on this rank's device, and the batches of an epoch as a function of (seed, epoch, step): nothing to save."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed import keyed
from distributed.config.data import CifarData, GeneratedData
from distributed.data import cifar, generated
from distributed.data.augment import augment, cut_out
from distributed.data.mix import mix
from distributed.data.split import validation_mask
from distributed.tree import leaves_of

Split = Literal["train", "validation", "test"]


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


@dataclass(frozen=True)
class _Held:
    images: Tensor  # uint8 [all, h, w, 3] of the file; shared by the splits cut from it
    labels: Tensor  # int64 [all]
    ids: Tensor  # int64 [n], which of them belong to this split


class DataPipeline:
    """All splits of a data set on one device.

    CIFAR is 184 MB of uint8, so every rank holds it whole; batches are gathered and augmented there by tensor operations.

    Raises:
        InputError: the files are not there or damaged.
    """

    def __init__(
        self,
        config: CifarData | GeneratedData,
        *,
        seed: int,
        global_batch_size: int,
        accumulation: int,
        evaluation_batch_size: int,
        rank: int,
        world_size: int,
        shards: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self.config, self.seed = config, seed
        self.global_batch_size, self.accumulation = global_batch_size, accumulation
        self.evaluation_batch_size = evaluation_batch_size
        self.shards, self.own_shards = shards, leaves_of(rank, world_size, shards)
        self.device, self.dtype = device, dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        train, test = _read(config, "train"), _read(config, "test")
        held_out = validation_mask(train.labels, fraction=config.validation_fraction, seed=config.split_seed)
        self._splits = {
            **self._hold(train, train=np.flatnonzero(~held_out), validation=np.flatnonzero(held_out)),
            **self._hold(test, test=np.arange(len(test.labels))),
        }
        # Of training images only: what is measured on must not shape the input. Two thousand give three digits.
        mean, deviation = _mean_and_deviation(train.images[np.flatnonzero(~held_out)[:2000]])
        self.mean, self.deviation = mean, deviation
        # As one multiply-add a pixel.
        self._scale = torch.tensor(1 / (255 * deviation), dtype=dtype, device=device)
        self._shift = torch.tensor(-mean / deviation, dtype=dtype, device=device)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the images, so that no data is needed to predict with it."""
        normalization = {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}
        return {"classes": [str(label) for label in range(self.num_classes)], "normalization": normalization}

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size("train") // self.global_batch_size)

    def size(self, split: Split) -> int:
        """Images in a split."""
        return len(self._splits[split].ids)

    def example(self) -> Batch:
        """The first few training images, whatever the rank: for trying a model out."""
        held = self._splits["train"]
        return self._train_batch(held, held.ids[:8], (8,), held.ids[:8], epoch=0, step_size=8)

    def train_epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `start_step` on, this rank's shard of each.

        Micro-batch j is a fixed slice of the global batch, so what batch norm sees does not depend on the ranks. The
        last step of an epoch may be smaller; a micro-batch of no images at all is left out, on all ranks alike.
        """
        held = self._splits["train"]
        order = keyed.permutation(self.size("train"), seed=self.seed, epoch=epoch, device=self.device)
        for step in range(start_step, self.steps_per_epoch):
            chosen = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            count = len(chosen)
            slices = [
                chosen[j * count // self.accumulation : (j + 1) * count // self.accumulation]
                for j in range(self.accumulation)
            ]
            # An image is mixed with the one before it in the micro-batch, whichever rank has that one.
            parts = [(self._own_part(s), self._own_part(s.roll(1))[0]) for s in slices if len(s)]
            yield [
                self._train_batch(held, held.ids[p], sizes, held.ids[partners], epoch=epoch, step_size=count)
                for (p, sizes), partners in parts
            ]

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """Every image of a split once over all ranks, unpadded; each rank gets as many batches, some perhaps empty."""
        held = self._splits[split]
        keys = torch.empty(0, 2, dtype=torch.int64, device=self.device)
        for start in range(0, self.size(split), self.evaluation_batch_size):
            ids, sizes = self._own_part(held.ids[start : start + self.evaluation_batch_size])
            yield Batch(
                self._input(self._normalized(held.images.index_select(0, ids))),
                held.labels[ids],
                ids,
                keys,
                self.size(split),
                sizes,
            )

    def _train_batch(
        self, held: _Held, ids: Tensor, shard_sizes: tuple[int, ...], partners: Tensor, *, epoch: int, step_size: int
    ) -> Batch:
        keys = keyed.sample_keys(ids, seed=self.seed, epoch=epoch)
        images, mixed = self._augmented(held, ids, keys), None
        if self.config.augment.mixes:
            others = self._augmented(held, partners, keyed.sample_keys(partners, seed=self.seed, epoch=epoch))
            images, own_part = mix(images, others, keys, self.config.augment)
            mixed = Mixed(held.labels[partners], own_part)
        return Batch(self._input(images), held.labels[ids], ids, keys, step_size, shard_sizes, mixed)

    def _augmented(self, held: _Held, ids: Tensor, keys: Tensor) -> Tensor:
        """Normalized [n, h, w, c]."""
        images = self._normalized(augment(held.images.index_select(0, ids), keys, self.config.augment))
        side = self.config.augment.cutout
        return cut_out(images, keys, side) if side else images

    def _normalized(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / deviation of uint8 [n, h, w, c]; rows are taken as one run of w * c numbers, which vectorizes."""
        rows = images.flatten(2)
        repeats = rows.shape[2] // len(self._scale)
        return torch.addcmul(self._shift.repeat(repeats), rows.to(self.dtype), self._scale.repeat(repeats)).view_as(
            images
        )

    def _input(self, images: Tensor) -> Tensor:
        """[n, h, w, c] as the models' [n, c, h, w], in the config's memory format."""
        return images.permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)

    def _own_part(self, chosen: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """This rank's shards of a slice of the global batch, one after the other, and their sizes, at most one apart."""
        count, own = len(chosen), self.own_shards
        cuts = [shard * count // self.shards for shard in range(own.start, own.stop + 1)]
        return chosen[cuts[0] : cuts[-1]], tuple(end - start for start, end in pairwise(cuts))

    def _hold(self, source: cifar.Images, **splits: NDArray[np.int64]) -> dict[str, _Held]:
        """The source on the device once, and the ids of each split that is cut from it."""
        images = torch.from_numpy(source.images).to(self.device)
        labels = torch.from_numpy(source.labels.astype(np.int64)).to(self.device)
        return {name: _Held(images, labels, torch.from_numpy(ids).to(self.device)) for name, ids in splits.items()}


def _mean_and_deviation(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each channel of images [n, h, w, c], in [0, 1]; from histograms, five times faster than from the pixels."""
    shades = np.arange(256) / 255
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    means = np.array([np.average(shades, weights=count) for count in counts])
    variances = [np.average((shades - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    return means, np.sqrt(variances)


def _read(config: CifarData | GeneratedData, split: Literal["train", "test"]) -> cifar.Images:
    if isinstance(config, CifarData):
        return cifar.read(config.name, config.root, split)
    return generated.read(config.name, config.train_samples if split == "train" else config.test_samples, split)
