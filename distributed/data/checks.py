"""Collective checks: all ranks read the same data, it is the official data set, and its splits are usable."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.data import ArraysData, ImageFolderData, ImportedData
from distributed.config.schedules import Plateau
from distributed.data.pipeline import DataPipeline, Split
from distributed.data.sources.cifar_spec import SETS
from distributed.data.sources.identity import Difference, class_difference, differences, image_difference
from distributed.data.sources.image_folder import SPLITS
from distributed.errors import InputError, counted, first_few

_SHOWN = 5


def check_data(config: TrainConfig, data: DataPipeline) -> None:
    """Compare what the ranks have read, and warn about data that is valid but probably unintended. A collective.

    Raises:
        InputError: on all ranks, if they read different data, or if a setting needs validation images and there are none.
    """
    check_same_data(config, data)
    warnings = _unofficial(config, data) + _small_splits(config, data)
    for line in warnings if collectives.rank() == 0 else ():
        logger.warning("{}", line)


def check_same_data(config: TrainConfig, data: DataPipeline) -> None:
    """Raise InputError on all ranks if one of them read different data from rank 0. A collective."""
    own: dict[str, Any] | InputError
    try:
        own = data.identity()
    except InputError as error:
        own = error  # gathered, so that all ranks raise it: if one rank left alone, its peers would keep waiting
    gathered = collectives.gather_objects(own)
    if unreadable := [line for found in gathered if isinstance(found, InputError) for line in found.lines]:
        raise InputError(*dict.fromkeys(unreadable))
    ranks: dict[Difference, list[int]] = {}
    for rank, found in enumerate(gathered):
        for difference in differences(gathered[0], found):
            ranks.setdefault(difference, []).append(rank)
    if ranks:
        lines = [
            f"data.name = {config.data.name}: {thing} is {theirs} on rank {first_few(list(map(str, differing)), _SHOWN)}, "
            f"but {ours} on rank 0"
            for (thing, ours, theirs), differing in list(ranks.items())[:_SHOWN]
        ]
        remedy = (
            "the function should return the same arrays in every process"
            if isinstance(config.data, ImportedData)
            else "every node needs the same files in data.root: copy them from one node to the others"
        )
        raise InputError(*lines, remedy)


def _unofficial(config: TrainConfig, data: DataPipeline) -> list[str]:
    """Return a warning if the images are not those of the CIFAR data set that the config names."""
    if config.data.name not in SETS:
        return []
    official, images = SETS[config.data.name].digests, data.identity()["images"]
    unknown = [
        f"{split} images {images[split]['digest']}" for split in official if images[split]["digest"] != official[split]
    ]
    if not unknown:
        return []
    return [
        f"data.name = {config.data.name}: not the official data set (digest of the {', of the '.join(unknown)}): pixels or "
        "labels were changed; unless that is intended, unpack the official archive again"
    ]


def _small_splits(config: TrainConfig, data: DataPipeline) -> list[str]:
    """Return warnings about splits with few images or none, and about folders that are not read.

    Raises:
        InputError: a setting needs validation images, and there are none.
    """
    train, warnings, fraction = data.size("train"), [], config.data.validation_fraction
    if fraction and not data.size("validation"):
        needed_by = ["schedule.name = plateau"] if isinstance(config.schedule, Plateau) else []
        needed_by += ["early_stopping"] if config.early_stopping else []
        if config.checkpoint.best_by in ("accuracy", "loss"):
            needed_by.append(f"checkpoint.best_by = {config.checkpoint.best_by}")
        cause = f"data.validation_fraction = {fraction:g} holds out none of the {train:,} training images"
        if needed_by:
            raise InputError(
                f"{cause}, and {' and '.join(needed_by)} need{'' if needed_by[1:] else 's'} some: raise it, or add images"
            )
        warnings.append(
            f"{cause}: the classes are too small, so no epoch is marked as the best; raise it, or set it to 0"
        )
    if absent := [data.class_names[label] for label in data.untrained_classes()]:
        warnings.append(
            f"{len(absent):,} of {data.num_classes:,} classes have no training image: {first_few(absent, _SHOWN)}; the "
            "network cannot learn them"
        )
    if isinstance(config.data, ImageFolderData):
        warnings += unread_folders(config.data.root)
    if config.global_batch_size > train:
        warnings.append(
            f"global_batch_size = {config.global_batch_size:,} is more than the {train:,} training images: an epoch is one "
            f"step of {train:,}"
        )
    return warnings


def unread_folders(root: Path) -> list[str]:
    """Return a warning for each folder of validation images beside train and test, unless it is one of these."""
    read = {os.path.realpath(root / split) for split in SPLITS}
    folders = [root / name for name in ("val", "valid", "validation")]
    return [
        f"{folder}: ignored: validation images are taken from train (data.validation_fraction); to train on these too, move "
        "them into train"
        for folder in folders
        if os.path.isdir(folder) and os.path.realpath(folder) not in read
    ]


def check_channels(trained_on: Mapping[str, Any], config: TrainConfig, data: DataPipeline) -> None:
    """Raise InputError if the images have other channels than those of the training run."""
    channels, before = data.raw_images(1).shape[-1], len(trained_on["normalization"]["mean"])
    if channels != before:
        raise InputError(
            f"the images have {counted(channels, 'channel')} here, but had {before} in training: {_remedy(config)} images "
            f"with {before}"
        )


def _remedy(config: TrainConfig) -> str:
    return "let data.name return" if isinstance(config.data, ImportedData) else "point --data.root at"


def check_evaluated(trained_on: Mapping[str, Any], config: TrainConfig, data: DataPipeline, split: Split) -> None:
    """Warn if a split differs from the training run's, as recorded in a checkpoint's state.json. A collective.

    Raises:
        InputError: ranks read different data, the classes are not those of training, or the split has no images.
    """
    check_same_data(config, data)
    here = data.identity()
    has_own_classes = isinstance(config.data, ImageFolderData | ArraysData | ImportedData)
    if has_own_classes and (other := class_difference(trained_on, here)):
        thing, before, now = other
        raise InputError(
            f"{thing} is {now} here, but was {before} in training: {_remedy(config)} images of the classes that the network "
            "was trained on"
        )
    if not data.size(split):
        raise InputError(f"--split {split}: this split has no images; use another")
    files = "test" if split == "test" else "train"
    changed = image_difference(trained_on, here, files, ordered=False)
    # Which images are held out depends on their order.
    held_out = files == "train" and config.data.validation_fraction and image_difference(trained_on, here, files)
    if (found := changed or held_out) and collectives.rank() == 0:
        meaning = "these are other images" if changed else "other images are held out for validation"
        logger.warning("{} is {} here, but was {} in training: {}", found.thing, found.other, found.one, meaning)
