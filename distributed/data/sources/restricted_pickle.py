"""Reads pickles of plain values and numpy arrays, and refuses everything that could run code. Imports no torch."""

import io
import pickle
from typing import Any

import numpy as np

_ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it needs {module}.{name}, but only plain values and numpy arrays are read")
        # Not imported by name: a pickle of Python 2 names a module that numpy has moved.
        return _empty_array if name == "_reconstruct" else getattr(np, name)


def _empty_array(kind: Any, shape: Any, letter: Any) -> Any:
    """Like numpy's `_reconstruct`, for plain arrays only: return an empty array, which the pickle fills."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("its array is not a plain numpy array")
    return np.ndarray(shape, np.uint8)


def load(content: bytes | memoryview) -> Any:
    """Return the value of a pickle: lists, dicts, text, bytes, numbers and numpy arrays. Text from Python 2 becomes bytes.

    Raises:
        ValueError: it is not a pickle, or needs anything else; none of its code was run.
    """
    try:
        return _Plain(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged bytes make the unpickler or numpy raise errors of any type
        raise ValueError(str(error) or type(error).__name__) from None
