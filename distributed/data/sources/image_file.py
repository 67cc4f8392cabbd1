"""One image from a file of whatever format, and one into a file."""

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
    """The image as its camera was held: float32 [3, h, w] of RGB in [0, 1]; of an animation the first picture.

    Raises:
        InputError: the file cannot be read, holds no image of a known format, or one of more than `max_pixels`.
    """
    from PIL import Image

    Image.init()
    formats = [name for name in Image.OPEN if name != "EPS"]  # for which another program is run
    try:
        with path.open("rb") as file, at_most(max_pixels):
            pixels = pixels_of(file, formats, deep=True)
    except TooLarge as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: no image that can be decoded ({error}); give a JPEG, PNG or the like") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an image that can be read") from None
    return torch.from_numpy(pixels).permute(2, 0, 1) / (255 if pixels.dtype == np.uint8 else 65535)


def pixels_of(file: IO[bytes], formats: list[str], *, deep: bool = False) -> NDArray[Any]:
    """RGB as it is shown, [h, w, 3]: uint8; if `deep`, float32 from 0 to 65535 of an image of 16 bits of grey.

    Raises:
        TooLarge: more pixels than `at_most` allows.
        ValueError: none of these formats, or broken.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=formats) as opened:
            upright = ImageOps.exif_transpose(opened)
            if not upright.mode.startswith("I"):
                return np.array(upright.convert("RGB"))
            grey = np.asarray(upright, np.float32).clip(0, 65535)  # a conversion to RGB would cut it off at 255
            shown = grey if deep else (grey.astype(np.int32) >> 8).astype(np.uint8)
            return np.repeat(shown[..., None], 3, axis=2)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"([0-9]+) pixels", str(error))
        size = f"{int(found[1]):,} pixels" if found else "its size"
        raise TooLarge(too_large(size, Image.MAX_IMAGE_PIXELS or 0)) from None
    except Exception as error:  # a damaged file leads Pillow's decoders to errors of any kind
        why = " ".join(re.sub(r"<_io\.[^>]*>", "it", str(error)).split()) or type(error).__name__
        raise ValueError(f"broken: {why}") from None


@contextmanager
def at_most(max_pixels: int) -> Iterator[None]:
    """Pillow looks at an image's size before it decodes: it warns above its limit, and raises above twice that.

    It applies to the process: one thread enters it while others decode.
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
    """An image [3, h, w] of pixels in [0, 1], which it is cut off to, as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()
