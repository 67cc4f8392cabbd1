"""One image from a file of whatever common format."""

from pathlib import Path

import torch
from torch import Tensor

from distributed.errors import InputError


def read_image(path: Path) -> Tensor:
    """The image as its camera was held: float32 [3, h, w] of RGB in [0, 1]; of an animation the first picture.

    Raises:
        InputError: the file cannot be read, or holds no image of a known format.
    """
    # Slow to import, and training never needs it.
    from torchvision.io import ImageReadMode, decode_image

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an image that can be read") from None
    try:
        if not content:
            raise RuntimeError("it is empty")
        image = decode_image(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: no image that can be decoded ({reason}); give a JPEG, PNG, GIF or WebP file"
        ) from None
    if image.dim() == 4:
        image = image[0]
    full = 65535 if image.dtype == torch.uint16 else 255
    return image.to(torch.float32) / full
