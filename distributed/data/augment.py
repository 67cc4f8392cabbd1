"""Random augmentation of an entire batch at once, on its device. Each sample has its own draws."""

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed import rng
from distributed.config.data import Augment


def augment(images: Tensor, sample_keys: Tensor, config: Augment, *, mirrored: Tensor | None = None) -> Tensor:
    """Crop and mirror uint8 images [n, h, w, c] by the samples' keys int64 [n, 2]; the result is contiguous.

    Args:
        mirrored: the images to mirror, bool [n]; by default, each with probability 1/2 if the config says so.
    """
    if not len(images):
        return images
    if config.crop:
        down = rng.integers(sample_keys, "crop_y", 2 * config.crop + 1)
        across = rng.integers(sample_keys, "crop_x", 2 * config.crop + 1)
        images = crop(images, config.crop, down, across, reflect=config.crop_padding == "reflect")
    if mirrored is None and config.flip:
        mirrored = rng.integers(sample_keys, "flip", 2).bool()
    if mirrored is not None:
        images = choose(mirrored, images.flip(2), images)
    return images


def alternating_flips(ids: Tensor, config: Augment, *, seed: int, epoch: int) -> Tensor | None:
    """Return which images alternating flip mirrors in this epoch, bool [n]; None if flips are not alternating.

    Each image is mirrored in every other epoch, so two epochs show both of its sides (Jordan 2024, arXiv 2404.00498).

    Args:
        ids: int64 [n], the samples' positions in the training set.
    """
    if config.flip != "alternating":
        return None
    first = rng.integers(rng.sample_keys(ids, seed=seed, epoch=0), "flip", 2)
    return (first + epoch) % 2 == 1


def crop(images: Tensor, padding: int, down: Tensor, across: Tensor, *, reflect: bool = False) -> Tensor:
    """Return the window at (down, across), int64 [n] each, of every padded image [n, h, w, c], in the image's size.

    A row of a window is a contiguous run of w * c bytes. Rows are selected from a view of the padded batch in which a
    row begins at every pixel, which is five times faster than indexing pixels.

    Args:
        reflect: the padding repeats the image, mirrored at its outermost pixels; else it is zero.
    """
    count, height, width, channels = images.shape
    padded = _reflected(images, padding) if reflect else F.pad(images, (0, 0, padding, padding, padding, padding))
    tall, wide = padded.shape[1:3]
    rows = padded.as_strided((count * tall * wide - width + 1, width * channels), (channels, 1))
    lines = torch.arange(height, device=images.device) + down[:, None]
    first = torch.arange(count, device=images.device)[:, None] * tall
    return rows.index_select(0, ((first + lines) * wide + across[:, None]).view(-1)).view(images.shape)


def _reflected(images: Tensor, padding: int) -> Tensor:
    """Return images [n, h, w, c] with reflected borders; torch's own reflection takes no uint8."""
    for dim in (1, 2):
        size = images.shape[dim]
        before = torch.arange(padding, 0, -1, device=images.device)
        inside, after = torch.arange(size, device=images.device), size - 1 - before.flip(0)
        images = images.index_select(dim, torch.cat([before, inside, after]))
    return images


def choose(chosen: Tensor, these: Tensor, others: Tensor) -> Tensor:
    """Return `these[i]` if `chosen[i]`, else `others[i]`: bool [n] over uint8 [n, ...].

    Images of a multiple of 8 bytes are processed as int64.
    """
    dtype = torch.int64 if others[:1].numel() % 8 == 0 else torch.uint8
    these64, others64 = these.flatten(1).view(dtype), others.flatten(1).view(dtype)
    return torch.where(chosen[:, None], these64, others64).view(torch.uint8).view(others.shape)


def cut_out(images: Tensor, sample_keys: Tensor, side: int) -> Tensor:
    """Zero a square around a random pixel, clipped at the border (DeVries and Taylor 2017, arXiv 1708.04552).

    Args:
        images: normalized, [n, h, w, c], so that zero is the mean.
    """
    height, width = images.shape[1:3]

    def inside(purpose: str, size: int) -> Tensor:
        start = rng.integers(sample_keys, purpose, size)[:, None] - side // 2
        line = torch.arange(size, device=images.device)
        return (line >= start) & (line < start + side)

    hole = inside("cutout_y", height)[:, :, None] & inside("cutout_x", width)[:, None, :]
    return images.masked_fill(hole[:, :, :, None], 0)
