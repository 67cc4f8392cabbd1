"""Reads the images of a folder as a training does."""

from pathlib import Path

from distributed.config.data import MAX_PIXELS
from distributed.data.sources.cifar import Images
from distributed.data.sources.decode import read_listed
from distributed.data.sources.image_folder import list_folder


def read_folder(root: Path, side: int, cache: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> list[Images]:
    """Return training and test images, uint8 [n, side, side, 3], mapped from the cache if it can be written."""
    return read_listed(root, list_folder(root).listings, side, cache, max_pixels=max_pixels)
