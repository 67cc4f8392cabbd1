"""Checks four arrays, the images and labels of two splits, by their types, shapes and labels. Imports no torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distributed.config.data import MAX_CLASSES
from distributed.config.layers import shown

SPLITS = ("train", "test")
NAMES = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))


class Complaint(NamedTuple):
    """The name of an array, and what is wrong with it."""

    name: str
    reason: str


class Outline(NamedTuple):
    """Type and shape of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def check_outlines(outlines: Mapping[str, Outline]) -> list[Complaint]:
    """Return what is wrong with the types and shapes of these arrays, some of `NAMES`, alone and together."""
    found = [
        Complaint(name, reason)
        for name, outline in outlines.items()
        if (reason := (_wrong_images if name.endswith("images") else _wrong_labels)(outline))
    ]
    right = {name: outline.shape for name, outline in outlines.items() if name not in {wrong.name for wrong in found}}
    for split in SPLITS:
        images, labels = right.get(f"{split}_images"), right.get(f"{split}_labels")
        if images and labels and images[0] != labels[0]:
            reason = f"{labels[0]:,} labels, but {split}_images has {images[0]:,} images; each image needs one label"
            found.append(Complaint(f"{split}_labels", reason))
    train, test = (right.get(f"{split}_images") for split in SPLITS)
    if train and test and _pixels(train) != _pixels(test):
        reason = f"images of {_pixels(test)}, but those of train_images are {_pixels(train)}; give both the same shape"
        found.append(Complaint("test_images", reason))
    return found


def check_labels(labels: Mapping[str, NDArray[np.integer[Any]]], classes: int | None) -> list[Complaint]:
    """Return what is wrong with the values of these labels, each of them not empty."""
    found = []
    highest = {name: int(array.max()) for name, array in labels.items()}
    for name, array in labels.items():
        if (lowest := int(array.min())) < 0:
            place = int(array.argmin())
            found.append(Complaint(name, f"label {lowest} of image {place:,}; labels should be 0, 1, 2 and so on"))
        if classes and highest[name] >= classes:
            reason = (
                f"label {highest[name]}, but data.classes = {classes} allows 0 to {classes - 1}; correct one of them"
            )
            found.append(Complaint(name, reason))
        elif highest[name] >= MAX_CLASSES:
            reason = f"label {highest[name]}; labels should be less than {MAX_CLASSES:,}: number the classes 0, 1, 2 and so on"
            found.append(Complaint(name, reason))
    if not found and not classes and len(labels) == len(SPLITS) and not any(highest.values()):
        found.append(Complaint("train_labels", "all labels are 0; classification needs two classes or more"))
    return found


def _wrong_images(outline: Outline) -> str:
    dtype, shape = outline
    wanted = "images should be uint8 [n, h, w] or [n, h, w, channels]"
    if dtype != np.uint8:
        return f"{_type(dtype)} {list(shape)}; {wanted}, with values of 0 to 255"
    if len(shape) not in (3, 4):
        return f"shape {list(shape)}; {wanted}"
    if 0 in shape:
        return f"shape {list(shape)}: no {'images' if not shape[0] else 'pixels'}; {wanted}"
    if len(shape) == 4 and shape[3] not in (1, 3):
        if shape[1] in (1, 3):
            return f"shape {list(shape)}; channels should come last: save images.transpose(0, 2, 3, 1)"
        return f"shape {list(shape)} with {shape[3]} channels; should have 1 (grey) or 3 (red, green, blue)"
    return ""


def _wrong_labels(outline: Outline) -> str:
    dtype, shape = outline
    wanted = "labels should be integers [n], one class number for each image"
    if dtype.kind not in "iu":
        return f"{_type(dtype)} {list(shape)}; {wanted}"
    if len(shape) != 1:
        return f"shape {list(shape)}; {wanted}"
    return "" if shape[0] else f"shape {list(shape)}: no labels; {wanted}"


def _type(dtype: np.dtype[Any]) -> str:
    return shown(str(dtype))


def _pixels(shape: tuple[int, ...]) -> str:
    """Return the shape of one image as text; [h, w] is the same as [h, w, 1]."""
    return " x ".join(f"{size:,}" for size in (*shape[1:], *([1] if len(shape) == 3 else [])))
