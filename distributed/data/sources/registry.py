"""The data set that a config names: its download, checks and class names. Imports no torch."""

from distributed.config.data import AnyData, ArraysData, CifarData, GeneratedData, ImageFolderData
from distributed.data.sources import arrays, cifar, download, image_folder
from distributed.data.sources.cifar_spec import SETS


def fetch_missing(config: AnyData) -> None:
    """Download the archive if the config requests it and no files are there, in one process per node.

    Call this before creating a process group.

    Raises:
        InputError: the download failed.
    """
    if isinstance(config, CifarData) and config.download and not cifar.is_there(config.name, config.root):
        archive = cifar.archive_to_fetch(config.name, config.urls)
        download.fetch(archive.urls, config.root / archive.name, md5=archive.md5)


def prepare(config: AnyData) -> None:
    """Download missing data as `fetch_missing` does, then check the data as far as possible without reading all of it.

    Raises:
        InputError: data is missing or damaged, or the download failed.
    """
    fetch_missing(config)
    if isinstance(config, CifarData):
        cifar.check(config.name, config.root)
    elif isinstance(config, ImageFolderData):
        image_folder.list_folder(config.root)
    elif isinstance(config, ArraysData):
        arrays.check(config)
    config.check_importable()


def class_names(config: CifarData | GeneratedData) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels."""
    if isinstance(config, CifarData):
        return SETS[config.name].class_names
    return tuple(f"class {label}" for label in range(config.num_classes))
