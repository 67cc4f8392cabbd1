"""Resizing of images within a network."""

import torch
from torch import Tensor
from torch.nn import functional as F


def resize(images: Tensor, side: int) -> Tensor:
    """Resize images bilinearly with antialiasing, like torchvision's Resize."""
    if images.shape[2:] == (side, side):
        return images
    if (
        images.shape[0] == 0
    ):  # an empty shard, which interpolate rejects; torch.export would fix the batch size for len()
        return images.new_empty(0, images.shape[1], side, side)
    resized = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return resized.contiguous(memory_format=_memory_format(images))


def _memory_format(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
