"""Decodes the files of an image folder once a node, into a file that every process maps."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distributed.data.cifar import Images
from distributed.data.image_folder import SPLITS, Listing, cache_folder, list_folder
from distributed.data.once import once_per_node
from distributed.data.progress import progress
from distributed.errors import InputError
from distributed.topology import available_cpus

_FORMAT = 1  # of the pixels: to be raised when `to_square` or the decoder's options change
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def read(root: Path, side: int, cache: Path | None = None) -> tuple[tuple[str, ...], list[Images]]:
    """Names of the classes; training and test images, uint8 [n, side, side, 3] mapped from the cache.

    Raises:
        InputError: the folder is not as it should be, or a file is no image; each such file is a line.
    """
    names, listings = list_folder(root)
    folder = cache_folder(root, cache)
    return names, [Images(_decoded(root, folder, s, listings[s], side), listings[s].labels) for s in SPLITS]


def _decoded(root: Path, folder: Path, split: str, listing: Listing, side: int) -> NDArray[np.uint8]:
    target = folder / f"{split}-{side}-{_FORMAT}-{listing.digest}.npy"
    shape = (len(listing.files), side, side, 3)

    def mapped() -> NDArray[np.uint8] | None:
        try:
            found: NDArray[np.uint8] = np.load(target, mmap_mode="c")  # "c": torch takes no read-only memory silently
        except (OSError, ValueError):
            return None
        return found if found.shape == shape and found.dtype == np.uint8 else None

    once_per_node(target, lambda: _decode_all(root, listing, split, target, shape), done=lambda: mapped() is not None)
    images = mapped()
    if images is None:
        raise InputError(f"{target}: cannot be read back; remove it, or name another folder with --data.cache")
    return images


def _decode_all(root: Path, listing: Listing, split: str, target: Path, shape: tuple[int, int, int, int]) -> None:
    """Write the array aside and rename it when it is whole."""
    aside, errors = target.with_name(f".{target.name}.writing"), []
    images = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
    with aside.open(
        "r+b"
    ) as file:  # a full disk is found here: in the midst of a mapped file it would kill the process
        os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)

    def one(index: int) -> str | None:
        try:
            images[index] = to_square(decode(root / listing.files[index]), shape[1]).numpy()
        except (ValueError, OSError) as error:
            return f"data.name = image_folder: {root / listing.files[index]}: {error}; mend, replace or remove it"
        return None

    with progress(f"decoding {split} images", len(listing.files), unit="images") as advance:
        for error in _in_threads(one, len(listing.files)):
            advance(1)
            if error:
                errors.append(error)
    if errors:
        aside.unlink()
        more = [f"data.name = image_folder: and {len(errors) - 20:,} more of the kind"] if len(errors) > 20 else []
        raise InputError(*errors[:20], *more)
    images.flush()
    os.replace(aside, target)


def _in_threads(one: Callable[[int], str | None], count: int) -> Iterator[str | None]:
    """`one` of each index; decoding runs outside Python's lock."""
    with ThreadPoolExecutor(available_cpus(), thread_name_prefix="decode") as threads:
        yield from threads.map(one, range(count))


def decode(path: Path) -> Tensor:
    """The image as uint8 [3, h, w] as a viewer shows it: RGB, turned as its EXIF data says, transparency left out.

    Raises:
        ValueError: it is no PNG or JPEG, or broken.
        OSError: it cannot be read.
    """
    from torchvision.io import ImageReadMode, decode_image

    content = path.read_bytes()
    if not content.startswith((_PNG, _JPEG)):
        raise ValueError("neither PNG nor JPEG, whatever its name says" if content else "empty")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        image: Tensor = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ValueError(f"broken: {str(error).splitlines()[0]}") from None
    return image if image.dtype == torch.uint8 else (image.int() >> 8).byte()  # PNG with 16 bits a channel


def to_square(image: Tensor, side: int) -> Tensor:
    """uint8 [3, h, w] as [side, side, 3]: the shorter side to `side`, bilinear with antialiasing, then the centre."""
    _, height, width = image.shape
    short = min(height, width)
    if short != side:
        size = (max(side, round(height * side / short)), max(side, round(width * side / short)))
        wide = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
        image = wide[0].round_().clamp_(0, 255).byte()
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side].permute(1, 2, 0)
