"""Mixes each training image with another one by the sample's own draws: mixup and cutmix."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed import rng
from distributed.config.data import Augment

_TRIES = 16
_ROW_MULTIPLE = 64  # a multiple of every processor's vector length


def mix(images: Tensor, partners: Tensor, sample_keys: Tensor, config: Augment) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner.

    Args:
        images: normalized, [n, h, w, c].
        partners: the images to mix with, [n, h, w, c].
        sample_keys: int64 [n, 2].

    Returns:
        The mixed images [n, h, w, c], and the weight in [0, 1] of each image's own label, [n], in the images' type.
    """
    if config.mixup and config.cutmix:
        boxed = rng.integers(sample_keys, "mix_by_box", 2).bool()
        blended, blended_weight = _mixup(images, partners, sample_keys, config.mixup)
        pasted, pasted_weight = _cutmix(images, partners, sample_keys, config.cutmix)
        mixed = torch.where(boxed[:, None, None, None], pasted, blended)
        return mixed, torch.where(boxed, pasted_weight, blended_weight)
    if config.cutmix:
        return _cutmix(images, partners, sample_keys, config.cutmix)
    return _mixup(images, partners, sample_keys, config.mixup)


def _mixup(images: Tensor, partners: Tensor, keys: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend the images by a weight from Beta(alpha, alpha) (Zhang et al. 2018, arXiv 1710.09412)."""
    weight = beta(keys, "mixup", alpha).to(images.dtype)
    return torch.lerp(partners, images, weight[:, None, None, None]), weight


def _cutmix(images: Tensor, partners: Tensor, keys: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner (Yun et al. 2019, arXiv 1905.04899).

    The box is clipped at the border, and the label's weight follows from the clipped box.
    """
    height, width = images.shape[1:3]
    side = (1 - beta(keys, "cutmix", alpha)).sqrt()

    def inside(purpose: str, size: int) -> Tensor:
        half = (side * size).long()[:, None] // 2
        centre = rng.integers(keys, purpose, size)[:, None]
        line = torch.arange(size, device=images.device)
        return (line >= centre - half) & (line < centre + half)

    box = inside("cutmix_y", height)[:, :, None] & inside("cutmix_x", width)[:, None, :]
    own_weight = 1 - box.sum((1, 2)) / (height * width)
    return torch.where(box[:, :, :, None], partners, images), own_weight.to(images.dtype)


def beta(keys: Tensor, purpose: str, alpha: float) -> Tensor:
    """Draw from Beta(alpha, alpha), alpha in (0, 1], once per sample: float64 [n].

    Jöhnk's rejection method (1964), with a fixed number of tries, of which the first accepted one counts. At least half
    of all tries are accepted, so at most one sample in 65,536 has none; it gets 0.5. All tries are drawn at once,
    because drawing one by one would launch hundreds of small kernels on a GPU.
    """
    units = rng.unit_of_each(keys, _purposes(purpose))
    # On a CPU pow rounds the tail of a row, which fills no vector, differently. With full vectors only, a sample's draw does
    # not depend on the others in its batch, and so not on the number of ranks.
    rows = F.pad(units, (0, -len(keys) % _ROW_MULTIPLE), value=0.5)
    torch._foreach_pow_(rows.unbind(), 1 / alpha)
    x, y = rows.view(2, _TRIES, rows.shape[1])[..., : len(keys)]
    total = x + y
    accepted = (total <= 1) & (total > 0)
    first = accepted.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(accepted, x / total, 0.5).gather(0, first)[0]


@cache
def _purposes(purpose: str) -> tuple[str, ...]:
    """Return the names of all draws: x of each try, then y of each."""
    return tuple(f"{purpose}_{attempt}_{axis}" for axis in "xy" for attempt in range(_TRIES))
