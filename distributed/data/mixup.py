"""Mixing each training image with another one, by the sample's own draws: mixup and cutmix."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed import rng
from distributed.config.data import Augment

_TRIES = 16
_VECTORS = 64  # numbers; a multiple of what any processor takes at once


def mix(images: Tensor, others: Tensor, sample_keys: Tensor, config: Augment) -> tuple[Tensor, Tensor]:
    """Each image with its partner in it, and how much of its own it kept.

    Args:
        images: normalized, [n, h, w, c]; others: the partners, alike; sample_keys: int64 [n, 2].

    Returns:
        images as before, and the part in [0, 1] of each label that stays, of the images' type, [n].
    """
    if config.mixup and config.cutmix:
        boxed = rng.integers(sample_keys, "mix_by_box", 2).bool()
        blended, blended_part = _mixup(images, others, sample_keys, config.mixup)
        pasted, pasted_part = _cutmix(images, others, sample_keys, config.cutmix)
        mixed = torch.where(boxed[:, None, None, None], pasted, blended)
        return mixed, torch.where(boxed, pasted_part, blended_part)
    if config.cutmix:
        return _cutmix(images, others, sample_keys, config.cutmix)
    return _mixup(images, others, sample_keys, config.mixup)


def _mixup(images: Tensor, others: Tensor, keys: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2018, arXiv 1710.09412."""
    part = beta(keys, "mixup", alpha).to(images.dtype)
    return torch.lerp(others, images, part[:, None, None, None]), part


def _cutmix(images: Tensor, others: Tensor, keys: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, arXiv 1905.04899: the box is cut off at the border, and the label follows what is left of it."""
    height, width = images.shape[1:3]
    side = (1 - beta(keys, "cutmix", alpha)).sqrt()

    def inside(purpose: str, size: int) -> Tensor:
        half = (side * size).long()[:, None] // 2
        centre = rng.integers(keys, purpose, size)[:, None]
        line = torch.arange(size, device=images.device)
        return (line >= centre - half) & (line < centre + half)

    box = inside("cutmix_y", height)[:, :, None] & inside("cutmix_x", width)[:, None, :]
    kept = 1 - box.sum((1, 2)) / (height * width)
    return torch.where(box[:, :, :, None], others, images), kept.to(images.dtype)


def beta(keys: Tensor, purpose: str, alpha: float) -> Tensor:
    """A draw of Beta(alpha, alpha) a sample, alpha in (0, 1], float64 [n].

    Jöhnk's rejection (1964), the first of a fixed number of tries that is accepted: at least half of all are, so that one
    sample in 65,536 has none and takes one half. All tries are drawn at once: on a GPU one after the other would be
    hundreds of small kernels.
    """
    units = rng.unit_of_each(keys, _purposes(purpose))
    # On a CPU pow rounds the tail of a row, what fills no vector, differently. In full vectors alone a sample's draw does not
    # depend on the others beside it, nor on the number of ranks.
    rows = F.pad(units, (0, -len(keys) % _VECTORS), value=0.5)
    torch._foreach_pow_(rows.unbind(), 1 / alpha)
    x, y = rows.view(2, _TRIES, rows.shape[1])[..., : len(keys)]
    total = x + y
    accepted = (total <= 1) & (total > 0)
    first = accepted.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(accepted, x / total, 0.5).gather(0, first)[0]


@cache
def _purposes(purpose: str) -> tuple[str, ...]:
    """The names of all draws: the tries' x, then their y."""
    return tuple(f"{purpose}_{attempt}_{axis}" for axis in "xy" for attempt in range(_TRIES))
