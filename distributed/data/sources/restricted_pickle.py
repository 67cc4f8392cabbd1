"""Reads a pickle of plain values and numpy arrays, and nothing that could run code. Imports no torch."""

import io
import pickle
from typing import Any

import numpy as np

_ADMITTED = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only plain values and numpy arrays are read"
            )
        # By hand, not by import: a pickle of Python 2 names a module that numpy has moved.
        return _empty_array if name == "_reconstruct" else getattr(np, name)


def _empty_array(kind: Any, shape: Any, letter: Any) -> Any:
    """What numpy's own `_reconstruct` makes, of plain arrays alone; the pickle fills it."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("an array of another kind than numpy's own")
    return np.ndarray(shape, np.uint8)


def load(content: bytes | memoryview) -> Any:
    """The value of a pickle: lists, dicts, text, bytes, numbers and numpy arrays. Text of Python 2 comes as bytes.

    Raises:
        ValueError: it is no pickle, or asks for anything else; nothing of it was run.
    """
    try:
        return _Plain(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # whatever damaged bytes make the unpickler or numpy raise
        raise ValueError(str(error) or type(error).__name__) from None
