"""Reads the data set that a config names; fingerprints of files that are mapped are computed in the background."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import NamedTuple

from distributed.config.data import AnyData, ArraysData, CifarData, ImageFolderData, ImportedData
from distributed.data.sources import arrays, cifar, decode, image_folder, registry, synthetic
from distributed.data.sources.arrays import GivenArrays
from distributed.data.sources.cifar import Images
from distributed.data.sources.identity import Identity
from distributed.data.sources.mapped import ReadAhead


class DataSet(NamedTuple):
    """Class names, training and test images; `identities` waits until the fingerprints of both splits are known.

    `read_ahead` holds, by split, what to call before images are read that are mapped from a file.
    """

    class_names: tuple[str, ...]
    train: Images
    test: Images
    identities: Callable[[], dict[str, Identity]]
    read_ahead: Mapping[str, ReadAhead] = MappingProxyType({})


def read(config: AnyData, side: int | None, given: GivenArrays | None = None) -> DataSet:
    """Return all images of the data set; those of an image folder in `side` x `side` pixels.

    Args:
        given: the arrays that Python code gave for the import path in the config.

    Raises:
        InputError: the files are missing or damaged.
    """
    if isinstance(config, ImageFolderData):
        assert side is not None  # see TrainConfig._side_conflicts
        return _read_folder(config, side)
    if isinstance(config, ArraysData | ImportedData):
        class_names, splits, read_ahead = arrays.read(config, given)
        identities = _in_background(
            lambda: {split: arrays.identity(images, read_ahead.get(split)) for split, images in splits.items()}
        )
        return DataSet(class_names, splits["train"], splits["test"], identities, read_ahead)
    names = registry.class_names(config)
    if isinstance(config, CifarData):
        (train, test), known = cifar.read_identified(config.name, config.root, ("train", "test"))
        return DataSet(names, train, test, lambda: known)
    counts = {"train": config.train_samples, "test": config.test_samples}
    train, test = (synthetic.read(config.name, count, split) for split, count in counts.items())
    return DataSet(names, train, test, lambda: {s: synthetic.identity(config.name, n, s) for s, n in counts.items()})


def _read_folder(config: ImageFolderData, side: int) -> DataSet:
    folder = image_folder.list_folder(config.root)
    identities = _in_background(
        lambda: {split: image_folder.identity(config.root, listing) for split, listing in folder.listings.items()}
    )
    train, test = decode.read_listed(config.root, folder.listings, side, config.cache, max_pixels=config.max_pixels)
    return DataSet(folder.class_names, train, test, identities)


def _in_background(work: Callable[[], dict[str, Identity]]) -> Callable[[], dict[str, Identity]]:
    """Start the work on a thread, which ends with it; return a function that waits for the result."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="identity")
    pending = thread.submit(work)
    thread.shutdown(wait=False)
    return pending.result
