"""The batches of an epoch as a pure function of (seed, epoch, step), so that there is no state to save."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distributed import rng
from distributed.config.data import AnyData
from distributed.data.augment import alternating_flips, augment, cut_out
from distributed.data.augment_function import AugmentFunction
from distributed.data.batch import Batch, Batching, InputFormat, MicroBatch, Mixed, Shards
from distributed.data.mixup import mix
from distributed.data.normalize import Normalizer, channel_statistics, spread
from distributed.data.residency import ResidentSplit, as_tensor, copied, residency
from distributed.data.sources import cifar
from distributed.data.sources.arrays import GivenArrays
from distributed.data.sources.mapped import ReadAhead
from distributed.data.sources.read import read
from distributed.data.split import validation_mask

Split = Literal["train", "validation", "test"]

_BYTES_AT_ONCE = 16 * 2**20


class DataPipeline:
    """All splits of a data set, on one device or, if it is too large for that, in host memory.

    Every rank has all images (CIFAR: 184 MB; decoded folders and arrays are mapped, once per node). Batches are gathered where
    the images are and augmented on the device by tensor operations. `class_names` are in the order of the labels.

    Args:
        decoded_side: height and width in pixels that images of a folder are decoded to; None for other data.
        given: the arrays that Python code gave for the import path in the config.

    Raises:
        InputError: the files are missing or damaged, or `data.augment.function` cannot be imported.
    """

    def __init__(
        self,
        config: AnyData,
        batching: Batching,
        shards: Shards,
        input_format: InputFormat,
        *,
        decoded_side: int | None = None,
        given: GivenArrays | None = None,
    ) -> None:
        self.config, self.batching, self.shards, self.input_format = config, batching, shards, input_format
        self.augment_function = AugmentFunction(path) if (path := config.augment.function) else None
        self.class_names, train, test, self._identities, read_ahead = read(config, decoded_side, given)
        resized_bytes = 3 * (input_format.resized_side or 0) ** 2  # as uint8, like the images before
        self.augmented_at_once = self._augmented_at_once(max(train.images[:1].nbytes, resized_bytes))
        images_bytes = train.images.nbytes + test.images.nbytes
        self._residency = residency(config.placement, images_bytes, device=input_format.device)
        held_out = validation_mask(train.labels, fraction=config.validation_fraction, seed=config.split_seed)
        train_ids = np.flatnonzero(~held_out)
        self._splits: dict[str, ResidentSplit] = {
            **self._resident(train, read_ahead.get("train"), train=train_ids, validation=np.flatnonzero(held_out)),
            **self._resident(test, read_ahead.get("test"), test=np.arange(len(test.labels))),
        }
        # Computed on training images only: the evaluation splits must not influence the input.
        mean, deviation = channel_statistics(train.images, train_ids, read_ahead.get("train"))
        is_unit = config.normalize == "unit"
        self.normalize_by(np.zeros_like(mean) if is_unit else mean, np.ones_like(mean) if is_unit else deviation)

    def normalize_by(self, mean: ArrayLike, deviation: ArrayLike) -> None:
        """Set the mean and deviation of each channel; a trained network needs those of its training images."""
        self.normalizer = Normalizer(mean, deviation, device=self.input_format.device, dtype=self.input_format.dtype)

    def _augmented_at_once(self, image_bytes: int) -> int:
        """Number of micro-batches to augment together: on CUDA, launching the kernels takes longer than running them."""
        if self.input_format.device.type != "cuda":
            return 1
        micro_batch_size = self.batching.global_batch_size // self.batching.grad_accum_steps
        local_images = max(1, micro_batch_size * len(self.shards.own) // self.shards.total)
        return max(1, _BYTES_AT_ONCE // (image_bytes * local_images))

    def _resident(
        self, source: cifar.Images, read_ahead: ReadAhead | None, **splits: NDArray[np.int64]
    ) -> dict[str, ResidentSplit]:
        """Return each split, by its ids, on one copy of the source's images."""
        device, prefetched = self.input_format.device, self._residency == "host"
        images = as_tensor(source.images)
        if not prefetched:
            images = copied(images, device, read_ahead)
        labels = torch.from_numpy(source.labels.astype(np.int64)).to(device)
        return {
            split: ResidentSplit(images, labels, torch.from_numpy(ids).to(device), prefetched, read_ahead)
            for split, ids in splits.items()
        }

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def identity(self) -> dict[str, Any]:
        """Return fingerprints of the images and the class names, as JSON; included in `metadata`.

        Raises:
            InputError: a file of an image folder can no longer be read.
        """
        images = {split: identity._asdict() for split, identity in self._identities().items()}
        return {"classes": list(self.class_names), "images": images}

    def metadata(self) -> dict[str, Any]:
        """Return the images' metadata for a checkpoint: enough to predict with it and to recognize the data."""
        normalization = {"mean": self.normalizer.mean.tolist(), "deviation": self.normalizer.deviation.tolist()}
        height, width = self._splits["train"].images.shape[1:3]
        return self.identity() | {"normalization": normalization, "image_size": [height, width]}

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size("train") // self.batching.global_batch_size)

    def size(self, split: Split) -> int:
        """Return the number of images in a split."""
        return len(self._splits[split].ids)

    def untrained_classes(self) -> list[int]:
        """Return the labels of the classes that have no training image."""
        train = self._splits["train"]
        counts = torch.bincount(train.labels[train.ids].cpu(), minlength=self.num_classes)
        return [label for label, count in enumerate(counts.tolist()) if not count]

    def example(self, *, low_res: bool = False) -> Batch:
        """Return the first few training images, the same on every rank, as example input; `low_res`: in that size."""
        order = self._splits["train"].ids[:8]
        entire = MicroBatch(0, n := len(order), slice(0, n), (n,), n)
        epoch = 0 if low_res else self.config.augment.low_res_epochs
        return next(self._augmented([entire], order, epoch=epoch))

    def raw_images(self, count: int) -> Tensor:
        """Return up to `count` images from all parts of the training split as stored: uint8 [n, h, w, c] on the device."""
        train = self._splits["train"]
        positions = torch.from_numpy(spread(len(train.ids), count)).to(train.ids.device)
        images = train.images.index_select(0, train.ids_for_gather(train.ids[positions]))
        return images.to(self.input_format.device)

    def inputs(self, count: int) -> Tensor:
        """Return the images of `raw_images` as the model's input: [n, c, h, w] on the device."""
        return self.input_format.converted(self.normalizer(self.raw_images(count)))

    def train_epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield, per step from `start_step` on, this rank's shards of each micro-batch.

        Micro-batch j is a fixed slice of the global batch, so the input of batch norm does not depend on the ranks. The last
        step of an epoch may be smaller; micro-batches without images are skipped, on all ranks.
        """
        train, seed = self._splits["train"], self.batching.seed
        order = train.ids[rng.permutation(len(train.ids), seed=seed, epoch=epoch, device=self.input_format.device)]
        steps = [self._micro_batches(step) for step in range(start_step, self.steps_per_epoch)]
        batches = self._augmented(list(chain.from_iterable(steps)), order, epoch=epoch)
        for micro_batches in steps:
            yield [next(batches) for _ in micro_batches]

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of a step of the epoch that have images."""
        start = step * self.batching.global_batch_size
        count = min(self.batching.global_batch_size, self.size("train") - start)
        accum = self.batching.grad_accum_steps
        bounds = [(start + j * count // accum, start + (j + 1) * count // accum) for j in range(accum)]
        return [MicroBatch.of(first, last, self.shards, global_count=count) for first, last in bounds if last > first]

    def _augmented(self, micro_batches: list[MicroBatch], order: Tensor, *, epoch: int) -> Iterator[Batch]:
        """Yield the batch of each micro-batch of the training split.

        Runs of micro-batches are gathered and augmented together. Each image has its own draws, so its bits do not depend
        on the others in its run.
        """
        train, config = self._splits["train"], self.config.augment
        at_once, seed = self.augmented_at_once, self.batching.seed
        runs = [micro_batches[first : first + at_once] for first in range(0, len(micro_batches), at_once)]

        def ids_and_partners(run: list[MicroBatch], order: Tensor) -> tuple[Tensor, Tensor]:
            ids = torch.cat([micro_batch.ids(order) for micro_batch in run])
            return ids, torch.cat([micro_batch.partners(order) for micro_batch in run]) if config.mixes else ids[:0]

        gather_order = train.ids_for_gather(order)
        gathered = train.gather(torch.cat(ids_and_partners(run, gather_order)) for run in runs)
        for run, images in zip(runs, gathered, strict=True):
            ids, partners = ids_and_partners(run, order)
            both = torch.cat([ids, partners])
            keys = rng.sample_keys(both, seed=seed, epoch=epoch)
            images = augment(images, keys, config, mirrored=alternating_flips(both, config, seed=seed, epoch=epoch))
            images, own_weight = self._transformed(images, keys, [size for own in run for size in own.shard_sizes])
            images = self.input_format.converted(
                images, side=config.low_res_side if epoch < config.low_res_epochs else None
            )
            labels = train.labels[ids]
            mixed = None if own_weight is None else Mixed(train.labels[partners], own_weight)
            stop = 0
            for micro_batch in run:
                own = slice(stop, stop := stop + sum(micro_batch.shard_sizes))
                yield Batch(
                    images[own], labels[own], ids[own], keys[own], micro_batch.global_count, micro_batch.shard_sizes,
                    mixed and Mixed(*[tensor[own] for tensor in mixed]),
                )  # fmt: skip

    def _transformed(self, images: Tensor, keys: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor | None]:
        """Normalize augmented images, and mix them with their partners if `images` has those too, behind the others.

        Args:
            images: uint8 [n, h, w, c], or [2 * n, h, w, c] with partners.
            keys: int64 [n, 2], or [2 * n, 2].
            sizes: number of images in each shard; their sum is n.

        Returns:
            images [n, h, w, c]; the weights of their own labels [n] if they are mixed.
        """
        count, config = sum(sizes), self.config.augment
        if self.augment_function:
            images = self.augment_function(images, keys, sizes * 2 if config.mixes else sizes)
        images = self.normalizer(images)
        if config.cutout:
            images = cut_out(images, keys, config.cutout)
        return mix(images[:count], images[count:], keys[:count], config) if config.mixes else (images, None)

    def evaluation(self, split: Split) -> Iterator[Batch]:
        """Yield every image of a split once over all ranks, unpadded.

        All ranks get the same number of batches. A batch may be empty.
        """
        resident, size, step = self._splits[split], self.size(split), self.batching.evaluation_batch_size
        keys = torch.empty(0, 2, dtype=torch.int64, device=self.input_format.device)
        micro_batches = [
            MicroBatch.of(start, min(start + step, size), self.shards, global_count=size)
            for start in range(0, size, step)
        ]
        gather_ids = resident.ids_for_gather(resident.ids)
        gathered = resident.gather(micro_batch.ids(gather_ids) for micro_batch in micro_batches)
        for micro_batch, images in zip(micro_batches, gathered, strict=True):
            ids = micro_batch.ids(resident.ids)
            images = self.input_format.converted(self.normalizer(images))
            yield Batch(images, resident.labels[ids], ids, keys, size, micro_batch.shard_sizes)
