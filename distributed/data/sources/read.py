"""Reads the data set that a config names; an image folder's fingerprints are computed in the background."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from distributed.config.data import AnyData, CifarData, ImageFolderData
from distributed.data.sources import cifar, decode, image_folder, registry, synthetic
from distributed.data.sources.cifar import Images
from distributed.data.sources.identity import Identity


class DataSet(NamedTuple):
    """Class names, training and test images; `identities` waits until the fingerprints of both splits are known."""

    class_names: tuple[str, ...]
    train: Images
    test: Images
    identities: Callable[[], dict[str, Identity]]


def read(config: AnyData, side: int) -> DataSet:
    """Return all images of the data set; those of an image folder in `side` x `side` pixels.

    Raises:
        InputError: the files are missing or damaged.
    """
    if isinstance(config, ImageFolderData):
        return _read_folder(config, side)
    names = registry.class_names(config)
    if isinstance(config, CifarData):
        (train, test), identities = cifar.read_identified(config.name, config.root, ("train", "test"))
        return DataSet(names, train, test, lambda: identities)
    counts = {"train": config.train_samples, "test": config.test_samples}
    train, test = (synthetic.read(config.name, count, split) for split, count in counts.items())
    return DataSet(names, train, test, lambda: {s: synthetic.identity(config.name, n, s) for s, n in counts.items()})


def _read_folder(config: ImageFolderData, side: int) -> DataSet:
    folder = image_folder.list_folder(config.root)
    thread = ThreadPoolExecutor(1, thread_name_prefix="identity")
    pending = thread.submit(
        lambda: {split: image_folder.identity(config.root, listing) for split, listing in folder.listings.items()}
    )
    thread.shutdown(wait=False)  # the thread ends with its work
    train, test = decode.read_listed(config.root, folder.listings, side, config.cache, max_pixels=config.max_pixels)
    return DataSet(folder.class_names, train, test, pending.result)
