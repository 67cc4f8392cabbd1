"""The states of random generators: to see draws from them, and to restore them."""

import pickle
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class _Access(NamedTuple):
    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


GLOBAL = [
    _Access("torch's generator", torch.get_rng_state, torch.set_rng_state),
    _Access("Python's generator", random.getstate, random.setstate),
    _Access("numpy's generator", np.random.get_state, np.random.set_state),
]


def access(generator: object) -> _Access | None:
    """Return how to read and write the state of a generator object, or None if it is something else."""
    if isinstance(generator, torch.Generator):
        return _Access("a torch.Generator", generator.get_state, generator.set_state)
    if isinstance(generator, random.Random):
        return _Access("a random.Random", generator.getstate, generator.setstate)
    if isinstance(generator, np.random.RandomState):
        return _Access("a numpy RandomState", generator.get_state, generator.set_state)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return _Access("a numpy Generator", lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


class SavedGenerators:
    """The states of the global generators of torch (CPU), Python and numpy, or of others, at one point in time."""

    def __init__(self, generators: list[_Access] = GLOBAL) -> None:
        self._generators = generators
        self.save()

    def save(self) -> None:
        """Replace the saved states by the present ones."""
        self._states = [generator.get() for generator in self._generators]

    def drawn(self) -> list[str]:
        """Return the names of the generators that were drawn from since their states were saved."""
        pairs = zip(self._generators, self._states, strict=True)
        return [generator.name for generator, state in pairs if _bits(generator.get()) != _bits(state)]

    def restore(self) -> None:
        """Restore the saved states."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set(state)


def _bits(state: Any) -> bytes:
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else pickle.dumps(state)
