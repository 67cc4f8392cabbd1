"""The images on this rank's device, and the batches of an epoch as a function of (seed, epoch, step): nothing to save."""

from collections.abc import Iterator
from itertools import chain, islice, pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed import rng
from distributed.comm.reduction_tree import shard_range
from distributed.config.data import AnyData
from distributed.data.augment import augment, cut_out
from distributed.data.batch import Batch, Mixed
from distributed.data.mixup import mix
from distributed.data.parts import MicroBatch, Part, ids_of, partners_of, wanted
from distributed.data.residency import ResidentSplit, place
from distributed.data.sources import cifar
from distributed.data.sources.read import read
from distributed.data.split import validation_mask

Split = Literal["train", "validation", "test"]


_BYTES_AT_ONCE = 16 * 2**20


class DataPipeline:
    """All splits of a data set, on one device or, where it is too large for that, in host memory.

    Every rank holds it whole (CIFAR: 184 MB of uint8; decoded image folders are mapped, once a node); batches are gathered
    where it lies and augmented on the device by tensor operations. `class_names` are in the labels' order.

    Args:
        side: in pixels, that images in folders are resized to when they are decoded; others stay as they are.

    Raises:
        InputError: the files are not there or damaged.
    """

    def __init__(
        self,
        config: AnyData,
        *,
        side: int,
        seed: int,
        global_batch_size: int,
        grad_accum_steps: int,
        evaluation_batch_size: int,
        rank: int,
        world_size: int,
        shards: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self.config, self.seed = config, seed
        self.global_batch_size, self.grad_accum_steps = global_batch_size, grad_accum_steps
        self.evaluation_batch_size = evaluation_batch_size
        self.shards, self.own_shards = shards, shard_range(rank, world_size, shards)
        self.device, self.dtype = device, dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.class_names, train, test, self._identities = read(config, side)
        # Launching the augmentation kernels takes longer than the GPU needs to augment thousands of images.
        images_of_one = max(1, global_batch_size // grad_accum_steps * len(self.own_shards) // shards)
        most = _BYTES_AT_ONCE // (train.images[:1].nbytes * images_of_one)
        self.augmented_at_once = max(1, most) if device.type == "cuda" else 1
        self._placement = place(config.placement, train.images.nbytes + test.images.nbytes, device)
        held_out = validation_mask(train.labels, fraction=config.validation_fraction, seed=config.split_seed)
        self._splits: dict[str, ResidentSplit] = {
            **self._hold(train, train=np.flatnonzero(~held_out), validation=np.flatnonzero(held_out)),
            **self._hold(test, test=np.arange(len(test.labels))),
        }
        # Of training images only: what is measured on must not shape the input. Two thousand give three digits.
        mean, deviation = _mean_and_deviation(train.images[np.flatnonzero(~held_out)[:2000]])
        if config.normalize == "unit":
            mean, deviation = np.zeros_like(mean), np.ones_like(deviation)
        self.mean, self.deviation = mean, deviation
        # As one multiply-add a pixel.
        self._scale = torch.tensor(1 / (255 * deviation), dtype=dtype, device=device)
        self._shift = torch.tensor(-mean / deviation, dtype=dtype, device=device)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def identity(self) -> dict[str, Any]:
        """Which images and classes these are, as JSON: a part of `facts`.

        Raises:
            InputError: a file of an image folder cannot be read any more.
        """
        images = {split: identity._asdict() for split, identity in self._identities().items()}
        return {"classes": list(self.class_names), "images": images}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the images: all that is needed to predict with it, and to know the data again."""
        normalization = {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}
        return self.identity() | {"normalization": normalization}

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size("train") // self.global_batch_size)

    def size(self, split: Split) -> int:
        """Images in a split."""
        return len(self._splits[split].ids)

    def untrained_classes(self) -> list[int]:
        """Labels of the classes that have no training image."""
        held = self._splits["train"]
        counts = torch.bincount(held.labels[held.ids].cpu(), minlength=self.num_classes)
        return [label for label, count in enumerate(counts.tolist()) if not count]

    def example(self) -> Batch:
        """The first few training images, whatever the rank: for trying a model out."""
        held = self._splits["train"]
        ids = held.ids[:8]
        block = [(Part(ids, (8,), ids if self.config.augment.mixes else ids[:0]), 8)]
        return next(self._augmented(held, next(iter(held.chosen([wanted(block)]))), block, epoch=0))

    def train_epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `start_step` on, this rank's shard of each.

        Micro-batch j is a fixed slice of the global batch, so what batch norm sees does not depend on the ranks. The
        last step of an epoch may be smaller; a micro-batch of no images at all is left out, on all ranks alike.
        """
        held = self._splits["train"]
        order = held.ids[rng.permutation(self.size("train"), seed=self.seed, epoch=epoch, device=self.device)]
        images = held.chosen(wanted(block) for block in self._blocks(self._reachable(order), start_step))
        blocks = (self._augmented(held, next(images), block, epoch=epoch) for block in self._blocks(order, start_step))
        batches = chain.from_iterable(blocks)
        for parts, _ in self._steps(order, start_step):
            yield [next(batches) for _ in parts]

    def _blocks(self, order: Tensor, start_step: int) -> Iterator[list[MicroBatch]]:
        """Runs of micro-batches whose images are augmented together. Each image has its own draws, so its bits do not
        depend on the others in its run."""
        micro_batches = ((part, count) for parts, count in self._steps(order, start_step) for part in parts)
        while block := list(islice(micro_batches, self.augmented_at_once)):
            yield block

    def _steps(self, order: Tensor, start_step: int) -> Iterator[tuple[list[Part], int]]:
        """Of each step of an epoch in this order, int64 [n]: this rank's part of each micro-batch; the step's size."""
        for step in range(start_step, self.steps_per_epoch):
            chosen = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            count = len(chosen)
            slices = [
                chosen[j * count // self.grad_accum_steps : (j + 1) * count // self.grad_accum_steps]
                for j in range(self.grad_accum_steps)
            ]
            yield [self._part(s) for s in slices if len(s)], count

    def _part(self, micro_batch: Tensor) -> Part:
        ids, sizes = self._own_part(micro_batch)
        # An image is mixed with the one before it in the micro-batch, whichever rank has that one.
        mixes = self.config.augment.mixes
        return Part(ids, sizes, self._own_part(micro_batch.roll(1))[0] if mixes else ids[:0])

    def _reachable(self, ids: Tensor) -> Tensor:
        """The ids where the images lie: brought over once, not a batch at a time, which would wait for the device."""
        return ids.cpu() if self._placement == "host" else ids

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """Every image of a split once over all ranks, unpadded; each rank gets as many batches, some perhaps empty."""
        held = self._splits[split]
        keys = torch.empty(0, 2, dtype=torch.int64, device=self.device)
        starts = range(0, self.size(split), self.evaluation_batch_size)

        def parts(of: Tensor) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
            return (self._own_part(of[start : start + self.evaluation_batch_size]) for start in starts)

        chosen = held.chosen(ids for ids, _ in parts(self._reachable(held.ids)))
        for (ids, sizes), images in zip(parts(held.ids), chosen, strict=True):
            yield Batch(
                self._input(self._normalized(images)),
                held.labels[ids],
                ids,
                keys,
                self.size(split),
                sizes,
            )

    def _augmented(
        self, held: ResidentSplit, images: Tensor, block: list[MicroBatch], *, epoch: int
    ) -> Iterator[Batch]:
        """The batches of a run of micro-batches. images: those of `wanted(block)`."""
        ids, partners = ids_of(block), partners_of(block)
        keys = rng.sample_keys(torch.cat([ids, partners]), seed=self.seed, epoch=epoch)
        images = self._normalized(augment(images, keys, self.config.augment))
        if self.config.augment.cutout:
            images = cut_out(images, keys, self.config.augment.cutout)
        mixed = None
        if self.config.augment.mixes:
            count = len(ids)
            images, own_part = mix(images[:count], images[count:], keys[:count], self.config.augment)
            mixed = Mixed(held.labels[partners], own_part)
        images, labels, stop = self._input(images), held.labels[ids], 0
        for part, step_size in block:
            own = slice(stop, stop := stop + len(part.ids))
            of_part = mixed and Mixed(mixed.labels[own], mixed.own_part[own])
            yield Batch(images[own], labels[own], part.ids, keys[own], step_size, part.shard_sizes, of_part)

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

    def _hold(self, source: cifar.Images, **splits: NDArray[np.int64]) -> dict[str, ResidentSplit]:
        """The source where it is to lie, once, and the ids of each split that is cut from it."""
        ahead = self._placement == "host"
        images = torch.from_numpy(source.images)
        images = images if ahead else images.to(self.device)
        labels = torch.from_numpy(source.labels.astype(np.int64)).to(self.device)
        return {
            split: ResidentSplit(images, labels, torch.from_numpy(ids).to(self.device), ahead)
            for split, ids in splits.items()
        }


def _mean_and_deviation(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each channel of images [n, h, w, c], in [0, 1]; from histograms, five times faster than from the pixels."""
    shades = np.arange(256) / 255
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    means = np.array([np.average(shades, weights=count) for count in counts])
    variances = [np.average((shades - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    deviations = np.sqrt(variances)
    return means, np.where(deviations > 0, deviations, 1.0)  # a channel of one shade is left as it is
