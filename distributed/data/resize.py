"""Resizes a batch on its device, bilinear with antialiasing, so that an image's bits do not depend on the others.

`F.interpolate` makes no such promise. Here each pixel is a sum of products in a fixed order, one operation at a time, which
IEEE arithmetic rounds alike in every batch, on every device.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class _Taps(NamedTuple):
    """What each output line is computed from: the input lines int64 [taps, out], and their weights [taps, out, 1, 1]."""

    lines: Tensor
    weights: Tensor


def resize_and_crop(images: Tensor, side: int) -> Tensor:
    """Resize the shorter side of images [n, h, w, c] to `side` and crop the centre: [n, side, side, c], of any strides."""
    height, width = images.shape[1:3]
    short = min(height, width)
    for size in (height, width):  # lines, then columns; each time the axis that is done moves behind the other
        resized = max(side, round(size * side / short))
        first = (resized - side) // 2
        if resized == size:
            images = images[:, first : first + side]
        else:
            images = _weighted(images, _taps(size, resized, first, side, images.dtype, images.device))
        images = images.transpose(1, 2).contiguous()
    return images


def _weighted(images: Tensor, taps: _Taps) -> Tensor:
    """Return weighted sums of the lines of images [n, lines, w, c]."""
    total: Tensor | None = None
    for lines, weights in zip(taps.lines, taps.weights, strict=True):
        term = images.index_select(1, lines).mul_(weights)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


@cache
def _taps(size: int, resized: int, first: int, count: int, dtype: torch.dtype, device: torch.device) -> _Taps:
    """Return the taps of `count` output lines from `first` on, of all `resized` ones: a triangle around each centre."""
    scale = size / resized
    support = max(scale, 1.0)
    centres = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale
    start = (centres - support + 0.5).long().clamp(min=0)
    stop = (centres + support + 0.5).long().clamp(max=size)
    lines = start + torch.arange(int((stop - start).max()))[:, None]
    weights = (1 - ((lines + 0.5 - centres) / support).abs()).clamp(min=0) * (lines < stop)
    weights /= weights.sum(0)
    return _Taps(lines.clamp(max=size - 1).to(device), weights[..., None, None].to(dtype).to(device))
