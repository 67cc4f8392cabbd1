"""Images for throwaway passes, and the states of the random generators."""

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed import rng

_GLOBAL: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "torch's generator": (torch.get_rng_state, torch.set_rng_state),
    "Python's generator": (random.getstate, random.setstate),
    "numpy's generator": (np.random.get_state, np.random.set_state),
}


def throwaway_batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return 3 different images, made from the first of `images` [n, 3, side, side], and their sample keys."""
    # An odd number, so that dimensions of other meanings, mostly even, are not mistaken for that of the samples.
    images = images[torch.arange(3) % len(images)].detach().float()
    ramp = torch.linspace(0.9, 1.1, images[0].numel()).view_as(images[0])
    images = torch.stack([image * ramp**index + 0.01 * index for index, image in enumerate(images)])
    return images, rng.sample_keys(torch.arange(3), seed=0, epoch=0)


class SavedGenerators:
    """The states of the generators of torch (on the CPU), Python and numpy at one point in time."""

    def __init__(self) -> None:
        self._states = {name: get() for name, (get, _) in _GLOBAL.items()}

    def drawn(self) -> list[str]:
        """Return the names of the generators that were drawn from since then."""
        return [name for name, (get, _) in _GLOBAL.items() if _bits(get()) != _bits(self._states[name])]

    def restore(self) -> None:
        """Restore the states."""
        for name, (_, restore) in _GLOBAL.items():
            restore(self._states[name])


def _bits(state: object) -> bytes:
    return state.numpy().tobytes() if isinstance(state, Tensor) else pickle.dumps(state)
