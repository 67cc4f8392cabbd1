"""Reads an image from a file of any format, and writes a PNG file."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed.config.data import MAX_PIXELS
from distributed.data.sources.image_size import TooLarge, too_large
from distributed.errors import InputError


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the image in its EXIF orientation, RGB, uint8 [3, h, w]; the first frame of an animation.

    Raises:
        InputError: the file cannot be read, is not an image in a known format, or has more than `max_pixels`.
    """
    from PIL import Image

    Image.init()
    formats = [name for name in Image.OPEN if name != "EPS"]  # EPS would run another program
    try:
        with path.open("rb") as file, at_most(max_pixels):
            pixels = pixels_of(file, formats)
    except TooLarge as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: not an image that can be decoded ({error}); name a JPEG, PNG or similar") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an image that can be read") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


class _UnknownRangeError(ValueError):
    """An image whose pixels are not fractions of a known maximum, e.g. of float type."""


def pixels_of(file: IO[bytes], formats: list[str]) -> NDArray[np.uint8]:
    """Return RGB in its EXIF orientation, uint8 [h, w, 3].

    Raises:
        TooLarge: it has more pixels than `at_most` allows.
        ValueError: it is in none of these formats, broken, or its pixels have no fixed range.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats) as opened:
            opened.load()
            turn = _turn_of(opened)
            upright: Image.Image = opened if turn is None else opened.transpose(turn)
            if upright.mode == "F" or (upright.mode == "I" and opened.format == "TIFF"):
                raise _UnknownRangeError(
                    f"pixels of mode {upright.mode} have no fixed range: convert it to 8 or 16 bits"
                )
            if not upright.mode.startswith("I"):
                return np.array(upright.convert("RGB"))
            grey = np.asarray(upright, np.float32).clip(0, 65535)  # converting to RGB would clip it at 255
            return np.repeat((grey.astype(np.int32) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"([0-9]+) pixels", str(error))
        size = f"{int(found[1]):,} pixels" if found else "its size"
        raise TooLarge(too_large(size, Image.MAX_IMAGE_PIXELS or 0)) from None
    except _UnknownRangeError:
        raise
    except UnidentifiedImageError:
        raise ValueError("broken, or in an unknown format") from None
    except Exception as error:  # Pillow's decoders raise errors of any kind for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"broken: {reason}") from None


def _turn_of(image: Any) -> Any:
    """Return the transposition that the EXIF orientation asks for; None: none, or a damaged EXIF block, as in a viewer.

    Not by ImageOps.exif_transpose: it also rewrites the block, and fails if another tag has an unusual type.
    """
    from PIL import ExifTags, Image

    to = Image.Transpose
    turns = {
        2: to.FLIP_LEFT_RIGHT, 3: to.ROTATE_180, 4: to.FLIP_TOP_BOTTOM, 5: to.TRANSPOSE, 6: to.ROTATE_270,
        7: to.TRANSVERSE, 8: to.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises errors of any kind for damaged blocks
        return None


@contextmanager
def at_most(max_pixels: int) -> Iterator[None]:
    """Make Pillow refuse images with more pixels before decoding them. By default it warns above its limit and raises at twice.

    It applies to the entire process: one thread enters it while others decode.
    """
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def png_of(image: Tensor) -> bytes:
    """Return an image [3, h, w] as a PNG file; pixels are clamped to [0, 1]."""
    from PIL import Image

    file = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()
