"""Reads the data set that a config names, and finds out which one it is while other things are done."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from distributed.config.data import AnyData, CifarData, ImageFolderData
from distributed.data.sources import cifar, decode, image_folder, registry, synthetic
from distributed.data.sources.cifar import Images
from distributed.data.sources.identity import Identity


class Read(NamedTuple):
    """Names of the classes, training and test images; `identities` waits until those of both splits are known."""

    class_names: tuple[str, ...]
    train: Images
    test: Images
    identities: Callable[[], dict[str, Identity]]


def read(config: AnyData, side: int) -> Read:
    """All images of the data set.

    Raises:
        InputError: the files are not there or damaged.
    """
    if isinstance(config, ImageFolderData):
        return _read_folder(config, side)
    names = registry.class_names(config)
    if isinstance(config, CifarData):
        (train, test), identities = cifar.read_identified(config.name, config.root, ("train", "test"))
        return Read(names, train, test, lambda: identities)
    counts = {"train": config.train_samples, "test": config.test_samples}
    train, test = (synthetic.read(config.name, count, split) for split, count in counts.items())
    return Read(names, train, test, lambda: {s: synthetic.identity(config.name, n, s) for s, n in counts.items()})


def _read_folder(config: ImageFolderData, side: int) -> Read:
    names, listings = image_folder.list_folder(config.root)
    thread = ThreadPoolExecutor(1, thread_name_prefix="identity")
    pending = thread.submit(lambda: {split: image_folder.identity(config.root, listings[split]) for split in listings})
    thread.shutdown(wait=False)  # it ends with its work
    train, test = decode.read_listed(config.root, listings, side, config.cache, max_pixels=config.max_pixels)
    return Read(names, train, test, pending.result)
