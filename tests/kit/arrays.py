"""Small data sets as NumPy arrays, and a module whose functions return such arrays, good and bad."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MODULE = """\
import numpy as np


def arrays(n=60, side=12, classes=3, channels=0, seed=0):
    drawn = np.random.default_rng(seed)
    found = {}
    for split, count in (("train", n), ("test", 16)):
        shape = (count, side, side, channels) if channels else (count, side, side)
        found[f"{split}_images"] = drawn.integers(0, 256, shape, dtype=np.uint8)
        found[f"{split}_labels"] = np.arange(count) % classes
    return found


def changed(name, how):
    found = arrays()
    array = found[name]
    found[name] = {
        "list": lambda: array.tolist(),
        "float": lambda: array.astype(float),
        "fewer": lambda: array[:-1],
        "channels": lambda: np.stack([array, array], 3),
        "strings": lambda: array.astype(str),
        "negative": lambda: array - 1,
        "zeros": lambda: array * 0,
        "huge": lambda: array + 10**12,
    }[how]()
    return found


def renamed():
    found = arrays()
    found["train_pictures"] = found.pop("train_images")
    return found


def nothing():
    pass


def fails():
    raise OSError("no disk\\nat all")


def other_on_each_process():
    import os

    return arrays(seed=int(os.environ.get("RANK", "0")))


def needs_path(path):
    return arrays()


number = 3
"""


def arrays_of(
    shape: tuple[int, ...] = (12, 12), *, train: int = 60, test: int = 16, classes: int = 3
) -> dict[str, NDArray[np.generic]]:
    """Return four arrays; in an image of class k, row k is bright."""
    drawn, found = np.random.default_rng(1), {}
    for split, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % classes).astype(np.int16)
        images = drawn.integers(0, 120, (count, *shape)).astype(np.uint8)
        images[np.arange(count), labels] += 120
        found |= {f"{split}_images": images, f"{split}_labels": labels}
    return found


def write_arrays(root: Path, shape: tuple[int, ...] = (12, 12), **sizes: int) -> Path:
    """Write the arrays as files into the folder and return it."""
    root.mkdir(parents=True, exist_ok=True)
    for name, array in arrays_of(shape, **sizes).items():
        np.save(root / f"{name}.npy", array)
    return root


def write_module(folder: Path, name: str = "own_data") -> None:
    """Write NAME.py into the folder."""
    (folder / f"{name}.py").write_text(MODULE)
