"""The fixed stratified shuffle that holds out validation images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed import keyed


def validation_mask(labels: NDArray[np.integer[Any]], *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which training images are held out: the same part of every class, a function of (labels, fraction, seed) alone.

    Returns:
        bool [n]; of a class with m images, round(m * fraction) are marked.
    """
    mask = np.zeros(len(labels), np.bool_)
    order = keyed.permutation(len(labels), seed=seed, epoch=-1).numpy()
    for label in np.unique(labels):
        members = order[labels[order] == label]
        mask[members[: round(len(members) * fraction)]] = True
    return mask
