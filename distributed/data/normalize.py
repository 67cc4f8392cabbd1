"""Normalization of pixels, by statistics of the training images."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from distributed import rng
from distributed.data.sources.mapped import ReadAhead

_BYTES_AT_ONCE = 2**23
_MAX_IMAGES = 2000  # enough for three digits


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel of pixels in [0, 1], float64 [channels]."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


def channel_statistics(
    images: NDArray[np.uint8], ids: NDArray[np.int64] | None = None, read_ahead: ReadAhead | None = None
) -> ChannelStatistics:
    """Return the statistics of images [n, h, w, c], or of those with these ids; the deviation of a constant channel is 1.

    Computed on at most 2,000 of them, from histograms, which is five times faster than from the pixels. Some MB are read at a
    time.
    """
    ids = np.arange(len(images)) if ids is None else ids
    ids = ids[spread(len(ids), _MAX_IMAGES)]
    values = np.arange(256) / 255
    counts = np.zeros((images.shape[-1], 256), np.int64)
    at_once = max(1, _BYTES_AT_ONCE // max(1, images[:1].nbytes))
    for start in range(0, len(ids), at_once):
        own = ids[start : start + at_once]
        if read_ahead:
            read_ahead(own)
        block = images[own]
        counts += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(len(counts))]
    means = np.array([np.average(values, weights=count) for count in counts])
    variances = [np.average((values - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    is_constant = np.count_nonzero(counts, axis=1) == 1  # the mean's rounding would leave a tiny deviation
    return ChannelStatistics(means, np.where(is_constant, 1.0, np.sqrt(variances)))


def spread(size: int, count: int) -> NDArray[np.int64]:
    """Return `count` of `size` positions, or all, in ascending order: a fixed random choice.

    The first images may be of one class, and so may be every tenth.
    """
    if count >= size:
        return np.arange(size)
    chosen: NDArray[np.int64] = rng.permutation(size, seed=0, epoch=-2)[:count].numpy()
    return np.sort(chosen)


class Normalizer:
    """Computes (x / 255 - mean) / deviation for uint8 images, as one multiply-add per pixel."""

    def __init__(self, mean: ArrayLike, deviation: ArrayLike, *, device: torch.device, dtype: torch.dtype) -> None:
        self.mean, self.deviation = np.asarray(mean), np.asarray(deviation)
        self.scale = torch.tensor(1 / (255 * self.deviation), dtype=dtype, device=device)
        self.shift = torch.tensor(-self.mean / self.deviation, dtype=dtype, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 [n, h, w, c]. Rows are processed as one run of w * c numbers, which vectorizes."""
        rows = images.flatten(2)
        repeats = rows.shape[2] // len(self.scale)
        scale, shift = self.scale.repeat(repeats), self.shift.repeat(repeats)
        return torch.addcmul(shift, rows.to(self.scale.dtype), scale).view_as(images)
