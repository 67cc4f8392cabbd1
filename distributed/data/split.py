"""The fixed stratified shuffle that holds out validation images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed import rng
from distributed.errors import InputError


def validation_mask(labels: NDArray[np.integer[Any]], *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask of the held-out training images, bool [n]: round(m * fraction) of each class with m images.

    The result depends on (labels, fraction, seed) only.

    Raises:
        InputError: all images are held out, so that none is left to train on.
    """
    mask = np.zeros(len(labels), np.bool_)
    if not fraction:
        return mask
    order = rng.permutation(len(labels), seed=seed, epoch=-1).numpy()
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    for members in np.split(by_class, np.cumsum(counts)[:-1]):
        mask[members[: round(len(members) * fraction)]] = True
    if len(mask) and mask.all():
        raise InputError(
            f"data.validation_fraction = {fraction:g}: holds out all {len(mask):,} training images, since every class has too "
            "few; lower it (0: none), or add images"
        )
    return mask
