"""Random changes of a whole batch at once, on its device, each sample by its own draws."""

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed import keyed
from distributed.config.tree import Augment


def augment(images: Tensor, sample_keys: Tensor, config: Augment) -> Tensor:
    """Crop and mirror uint8 images [n, c, h, w] by the samples' keys int64 [n, 2]; same shape, contiguous channels last."""
    height, width = images.shape[-2:]
    if config.crop:
        down = keyed.integers(sample_keys, "crop_y", 2 * config.crop + 1)
        across = keyed.integers(sample_keys, "crop_x", 2 * config.crop + 1)
        padded = F.pad(images, (config.crop,) * 4)
        # Every place of the window as a view [n, places down, places across, c, h, w]; only the drawn ones are copied.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        images = windows[torch.arange(len(images), device=images.device), down, across]
    if config.flip:
        mirrored = keyed.integers(sample_keys, "flip", 2).bool()
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def cut_out(images: Tensor, sample_keys: Tensor, side: int) -> Tensor:
    """Zero a square around a random pixel, cut off at the border (DeVries and Taylor 2017, arXiv 1708.04552).

    images: normalized, [n, c, h, w], so that zero is the mean.
    """
    height, width = images.shape[-2:]

    def inside(purpose: str, size: int) -> Tensor:
        start = keyed.integers(sample_keys, purpose, size)[:, None] - side // 2
        line = torch.arange(size, device=images.device)
        return (line >= start) & (line < start + side)

    hole = inside("cutout_y", height)[:, :, None] & inside("cutout_x", width)[:, None, :]
    return images.masked_fill(hole[:, None], 0)
