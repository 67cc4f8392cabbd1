"""The data set that a config names: fetched where that was asked for, checked, its classes. Imports no torch."""

from distributed.config.data import AnyData, CifarData, ImageFolderData
from distributed.data.sources import cifar, download, image_folder
from distributed.data.sources.cifar_spec import SETS


def fetch_missing(config: AnyData) -> None:
    """Fetch the archive if the config says so and nothing is there; the processes of a node wait for the one that does it.

    To be called before any process group exists.

    Raises:
        InputError: it could not be fetched.
    """
    if isinstance(config, CifarData) and config.download and not cifar.is_there(config.name, config.root):
        archive, md5, urls = cifar.archive_to_fetch(config.name, config.urls)
        download.fetch(urls, config.root / archive, md5=md5)


def prepare(config: AnyData) -> None:
    """`fetch_missing`; then look at what can be looked at without reading everything.

    Raises:
        InputError: data is missing or damaged, or could not be fetched.
    """
    fetch_missing(config)
    if isinstance(config, CifarData):
        cifar.check(config.name, config.root)
    elif isinstance(config, ImageFolderData):
        image_folder.list_folder(config.root)


def class_names(config: AnyData) -> tuple[str, ...]:
    """Names of the classes, in the order of their labels.

    Raises:
        InputError: of image folders, that are not there.
    """
    if isinstance(config, CifarData):
        return SETS[config.name].class_names
    if isinstance(config, ImageFolderData):
        return image_folder.list_folder(config.root)[0]
    return tuple(f"class {label}" for label in range(config.num_classes))
