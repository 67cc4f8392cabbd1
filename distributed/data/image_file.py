"""One image from a file of whatever format, and one into a file."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distributed.config.data import MAX_PIXELS
from distributed.data.image_size import too_large
from distributed.errors import InputError


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image as its camera was held: float32 [3, h, w] of RGB in [0, 1]; of an animation the first picture.

    Raises:
        InputError: the file cannot be read, holds no image of a known format, or one of more than `max_pixels`.
    """
    # Not torchvision's decoders, which 0.29 has marked as going away.
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    formats = [name for name in Image.OPEN if name != "EPS"]  # for which another program is run
    try:
        with _at_most(max_pixels), Image.open(path, formats=formats) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 bits of grey, which a conversion to RGB would cut off at 255
                grey = torch.from_numpy(np.asarray(upright, np.float32) / np.float32(65535)).clamp(0, 1)
                return grey.expand(3, -1, -1)
            pixels = np.array(upright.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"([0-9]+) pixels", str(error))
        size = f"{int(found[1]):,} pixels" if found else "its size"
        raise InputError(f"{path}: {too_large(size, max_pixels)}") from None
    except UnidentifiedImageError as error:
        reason = str(error).replace(repr(str(path)), "it")
        raise InputError(f"{path}: no image that can be decoded ({reason}); give a JPEG, PNG or the like") from None
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path}: {error.strerror}; name an image that can be read") from None
        raise InputError(f"{path}: no image that can be decoded ({error}); give a JPEG, PNG or the like") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32) / 255


@contextmanager
def _at_most(max_pixels: int) -> Iterator[None]:
    """Pillow looks at an image's size before it decodes: it warns above its limit, and raises above twice that."""
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
