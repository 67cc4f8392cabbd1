"""Decodes the files of an image folder once per node, into a file that every process maps."""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from torch import Tensor
from torch.nn import functional as F

from distributed.config.data import MAX_PIXELS
from distributed.data.sources.cifar import Images
from distributed.data.sources.image_cache import BLOCK, FORMAT, CacheFile, Pixels, Untrusted, folders, in_threads
from distributed.data.sources.image_file import at_most, pixels_of
from distributed.data.sources.image_folder import SPLITS, Listing, refusal
from distributed.data.sources.image_size import TooLarge, check_sums, size_of, too_large
from distributed.data.sources.once_per_node import once_per_node
from distributed.data.sources.progress import progress
from distributed.errors import InputError
from distributed.host.versions import versions
from distributed.topology import Topology

Store = Callable[[int, Pixels], None]
"""Stores a block of images, given the index of its first one."""


def read_listed(
    root: Path, listings: Mapping[str, Listing], side: int, cache: Path | None, *, max_pixels: int
) -> list[Images]:
    """Return training and test images, uint8 [n, side, side, 3], mapped from the cache if it can be written.

    Raises:
        InputError: files that are not images or too large, one line each, or the cache cannot be written.
    """
    if cache and next(folders(root, cache), None) is None:
        raise InputError(
            f"data.cache: cannot write to {cache}, or other users can; name another folder with --data.cache"
        )
    found, errors = [], list[str]()
    for split in SPLITS:
        listing = listings[split]
        decode_all = partial(_decode_all, root, listing, split, side, max_pixels)
        shape = (len(listing.files), side, side, 3)
        request = f"{root.resolve()} {max_pixels}"
        # Another pillow may decode other pixels.
        name = f"{split}-{side}-{listing.digest}-pillow-{versions()['pillow']}-{FORMAT}.images"
        files = (CacheFile(folder.path / name, folder.owner, shape, listing.digest) for folder in folders(root, cache))
        try:
            found.append(Images(_decoded(files, shape, decode_all, request), listing.labels))
        except InputError as error:
            errors += error.lines
    if errors:
        raise InputError(*errors)
    return found


def _decoded(
    files: Iterator[CacheFile], shape: tuple[int, int, int, int], decode_all: Callable[[Store], None], request: str
) -> Pixels:
    """Return the images from the first cache file that can be written, else from memory: a cache only saves time."""
    reasons = []
    for file in files:
        try:
            return _from_cache(file, decode_all, request)
        except (OSError, Untrusted) as error:
            reasons.append(f"{file.path.parent}: {getattr(error, 'strerror', None) or error}")
    # Each process of this node has a copy.
    if (3 + Topology.from_environment().local_world_size) * np.prod(shape) > _available_memory():
        raise InputError(
            f"data.cache: no room for {np.prod(shape) / 1e9:,.1f} GB of decoded images on disk or in memory "
            f"({', '.join(reasons)}); free disk space, or name a folder with --data.cache"
        )
    logger.warning(
        "data.cache: decoded images are not cached ({}); each process decodes them at every start",
        ", ".join(reasons) or "no folder that can be written",
    )
    images = np.empty(shape, np.uint8)

    def store(first: int, block: Pixels) -> None:
        images[first : first + len(block)] = block

    decode_all(store)
    return images


def _from_cache(file: CacheFile, decode_all: Callable[[Store], None], request: str) -> Pixels:
    """Return the images of a cache file, which is written if it is missing or not trusted.

    Args:
        request: what decoding depends on besides the file's name: a run with another limit does not share its failures.

    Raises:
        OSError: it cannot be written.
        Untrusted: the file just written does not read back intact.
    """
    images: Pixels | None = None
    untrusted: Untrusted | None = None

    def done() -> bool:
        nonlocal images, untrusted
        try:
            images, untrusted = file.load(), None
        except Untrusted as reason:
            untrusted = reason
        return images is not None

    def work() -> None:
        if untrusted:
            logger.warning("{}: {}; decoding the images again", file.path, untrusted)
        file.write(decode_all)

    once_per_node(file.path, work, done=done, request=request)
    if images is None and not done():
        raise untrusted or Untrusted("it has disappeared")
    assert images is not None
    return images


def _available_memory() -> float:
    """Return how many bytes this machine can still give to processes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def _decode_all(root: Path, listing: Listing, split: str, side: int, max_pixels: int, store: Store) -> None:
    """Decode all images of a split on threads and store them block by block.

    Raises:
        InputError: files that are not images or too large, one line each.
    """
    errors: list[str] = []

    def decode_block(first: int) -> tuple[int, list[str]]:
        files, wrong = listing.files[first : first + BLOCK], []
        images = np.empty((len(files), side, side, 3), np.uint8)
        for place, file in enumerate(files):
            try:
                images[place] = to_size(decode(root / file, max_pixels=max_pixels), side, side, max_pixels).numpy()
            except TooLarge as error:
                wrong.append(f"{root / file}: {error}")
            except (ValueError, OSError) as error:
                wrong.append(f"{root / file}: {error}; repair, replace or remove it")
        if not wrong:
            store(first, images)
        return len(files), wrong

    bar = progress(f"decoding {split} images", len(listing.files), unit="images")
    with at_most(max_pixels), bar as advance:
        for count, wrong in in_threads(decode_block, len(listing.files)):
            advance(count)
            errors += wrong
    if errors:
        raise refusal(errors)


def decode(path: Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the image as a viewer shows it, uint8 [3, h, w]: RGB, in its EXIF orientation, without transparency.

    Raises:
        TooLarge: its header or its file size implies more than `max_pixels`.
        ValueError: it is not a PNG or JPEG, or is broken.
        OSError: it cannot be read.
    """
    # A file has at most 8 bytes per pixel, plus some metadata.
    if (total_bytes := path.stat().st_size) > 8 * max_pixels + 2**26:
        raise TooLarge(too_large(f"{total_bytes:,} bytes", max_pixels))
    content = path.read_bytes()
    width, height = size_of(content)
    if width * height > max_pixels:
        raise TooLarge(too_large(f"{width:,} x {height:,} pixels", max_pixels))
    check_sums(content)
    # Not torchvision's decoder, which ends the process on some damaged files.
    return torch.from_numpy(pixels_of(io.BytesIO(content), ["PNG", "JPEG"])).permute(2, 0, 1)


def to_size(image: Tensor, height: int, width: int, max_pixels: int = MAX_PIXELS, *, rounded: bool = True) -> Tensor:
    """Resize uint8 [c, h, w] until it covers height x width pixels, bilinear with antialiasing, and crop the centre.

    Args:
        rounded: round resized pixels to uint8; otherwise they are float32.

    Returns:
        [height, width, c], with pixels from 0 to 255.

    Raises:
        TooLarge: before cropping it would have more than `max_pixels`, e.g. if it is one pixel high.
    """
    _, own_height, own_width = image.shape
    new, old = (height, own_height) if height * own_width >= width * own_height else (width, own_width)
    if new != old:
        size = (max(height, round(own_height * new / old)), max(width, round(own_width * new / old)))
        if size[0] * size[1] > max_pixels:
            scaled = f"{own_width:,} x {own_height:,} pixels scaled to {size[1]:,} x {size[0]:,}"
            raise TooLarge(too_large(scaled, max_pixels))
        wide = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
        image = wide[0].clamp_(0, 255)
        image = image.round_().byte() if rounded else image
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width].permute(1, 2, 0)
