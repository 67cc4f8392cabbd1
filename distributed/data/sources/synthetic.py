"""Procedural images in CIFAR's format: nothing to download, the same bytes everywhere.

A class is a pair of spatial frequencies, vertical and horizontal, of a woven pattern. Each image has its own phases, colours
and contrast, noise and a distracting patch. A hundred classes are 25 background colours times four weaves. Random phases
hide the weave from a linear model; neither shifting nor mirroring changes the class. Triangle waves and integer hashes are
exact in floating point, unlike a cosine, whose last bit may differ between machines.
"""

import hashlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed.data.sources.cifar import Images
from distributed.data.sources.identity import Identity

_SIDE = 32
_CHUNK = 5000
Floats = NDArray[np.float32]

_WEAVES = np.array(
    [(2, 2), (2, 3.2), (3.2, 2), (3.2, 3.2), (2, 5), (5, 2), (5, 5), (3.2, 5), (5, 3.2), (7, 7)], np.float32
)  # periods per image, vertical and horizontal
_FOUR_WEAVES = np.array([(4, 4), (4, 10), (10, 4), (10, 10)], np.float32)
_LEVELS = np.array([70, 128, 185], np.float32)  # of red, green and blue: 27 colours, of which 25 are used


def read(name: str, count: int, split: str) -> Images:
    """Return `count` images of `generated10` or `generated100`, uint8 [count, 32, 32, 3], and balanced labels uint8 [count]."""
    classes = 100 if name.endswith("100") else 10
    first = 0 if split == "train" else 1 << 30
    images = np.empty((count, _SIDE, _SIDE, 3), np.uint8)
    labels = (np.arange(count) % classes).astype(np.uint8)
    noise = _noise_tiles()
    for start in range(0, count, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, count), dtype=np.uint32)
        drawn = _draw(ids + np.uint32(first), labels[start : start + _CHUNK], classes, noise)
        images[start : start + _CHUNK] = drawn.transpose(0, 2, 3, 1)
    return Images(images, labels)


def identity(name: str, count: int, split: str) -> Identity:
    """Return the fingerprint of the images that `read` returns: a digest of its arguments, which determine them."""
    return Identity(count, hashlib.blake2b(f"{name} {split} {count}".encode(), digest_size=8).hexdigest())


def _draw(ids: NDArray[np.uint32], labels: NDArray[np.uint8], classes: int, noise: Floats) -> NDArray[np.uint8]:
    def uniform(purpose: int, *shape: int) -> Floats:
        offsets = np.arange(np.prod(shape, dtype=int), dtype=np.uint32) * np.uint32(0x9E3779B9)
        mixed = _mix(_mix(ids ^ np.uint32(purpose * 0x85EBCA6B & 0xFFFFFFFF))[:, None] ^ offsets)
        return ((mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(len(ids), *shape)

    down, across = _frequencies(labels, classes)
    position = np.arange(_SIDE, dtype=np.float32) / _SIDE
    rows = _triangle(position * down[:, None] + uniform(1, 1))
    columns = _triangle(position * across[:, None] + uniform(2, 1))
    weave = rows[:, :, None] * columns[:, None, :]
    colour = (uniform(3, 3) - 0.5) * 2
    contrast = (40 if classes == 100 else 20) + 110 * uniform(4, 1)
    background = 70 + 115 * uniform(5, 3)
    if classes == 100:
        colours = labels[:, None] % 25 // np.array([1, 3, 9])
        background = _LEVELS[colours % 3] + 30 * (uniform(5, 3) - 0.5)
    images = background[:, :, None, None] + (colour * contrast)[:, :, None, None] * weave[:, None]
    images += noise[_mix(ids ^ np.uint32(6)) % np.uint32(len(noise))]
    top, left = (uniform(7, 2) * (_SIDE - 10)).astype(np.int64).T
    line = np.arange(_SIDE)
    patch = ((line >= top[:, None]) & (line < top[:, None] + 10))[:, :, None] & (
        (line >= left[:, None]) & (line < left[:, None] + 10)
    )[:, None]
    images = np.where(patch[:, None], 255 * uniform(8, 3)[:, :, None, None], images)
    return np.clip(images, 0, 255).astype(np.uint8)


def _frequencies(labels: NDArray[np.uint8], classes: int) -> tuple[Floats, Floats]:
    """Return the periods per image, vertical and horizontal, of each label's weave."""
    periods = _FOUR_WEAVES[labels // 25] if classes == 100 else _WEAVES[labels]
    return periods[:, 0], periods[:, 1]


def _triangle(x: NDArray[Any]) -> Floats:
    """Return a triangle wave of period 1 between -1 and 1."""
    wave: Floats = (4 * np.abs(x - np.floor(x) - np.float32(0.5)) - 1).astype(np.float32)
    return wave


@cache
def _noise_tiles(tiles: int = 512) -> Floats:
    """Return noise [tiles, 3, 32, 32], approximately normal with a deviation of 17; each image uses one tile.

    Read-only, and kept: it takes as long as a thousand images.
    """
    count = tiles * 3 * _SIDE * _SIDE
    total = np.zeros(count, np.float32)
    for term in range(4):
        mixed = _mix(np.arange(count, dtype=np.uint32) + np.uint32(term * count))
        total += (mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    normal: Floats = ((total - 2) * np.float32(30)).reshape(tiles, 3, _SIDE, _SIDE)
    normal.flags.writeable = False
    return normal


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Apply lowbias32 (Wellons, https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
