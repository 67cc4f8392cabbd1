from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.data.sources.decode import decode
from distributed.data.sources.image_file import png_of, read_image
from distributed.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "jpg", "bmp"])
def test_every_common_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    smooth = np.asarray(Image.fromarray(PIXELS).resize((4, 3)).resize((40, 24)))
    Image.fromarray(smooth).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert (image.shape, image.dtype) == ((3, 24, 40), torch.uint8)
    expected = torch.from_numpy(smooth.copy()).permute(2, 0, 1)
    if suffix in ("png", "webp", "bmp"):
        assert torch.equal(image, expected)
    else:
        assert (image.float() - expected.float()).abs().mean() < 13


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "I;16"])
def test_every_kind_of_png_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    if mode == "I;16":
        Image.fromarray(np.full((24, 40), 65535, np.uint16)).save(path)
    else:
        Image.fromarray(PIXELS).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 24, 40)
    assert image.max() > 230
    if mode == "I;16":
        assert torch.equal(image, torch.full((3, 24, 40), 255, dtype=torch.uint8))


def test_grey_of_16_bits_is_read_as_for_training(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert torch.equal(image, decode(tmp_path / "image.png"))
    assert torch.equal(image[0], torch.from_numpy((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_fixed_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "image.tif")
    with pytest.raises(InputError, match="no fixed range: convert it to 8 or 16 bits"):
        read_image(tmp_path / "image.tif")


def test_a_damaged_exif_block_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "image.jpg", exif=exif, dpi=(72, 72))
    content = (tmp_path / "image.jpg").read_bytes()
    assert content.count(b"Exif\0\0") == 1
    place = content.index(b"Exif\0\0") + 6
    (tmp_path / "image.jpg").write_bytes(content[:place] + b"xx" + content[place + 2 :])
    assert read_image(tmp_path / "image.jpg").shape == (3, 24, 40)


def test_a_written_image_reads_back_equal(tmp_path: Path) -> None:
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    (tmp_path / "image.png").write_bytes(png_of(image / 255))
    assert torch.equal(read_image(tmp_path / "image.png"), image)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(PIXELS).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").shape == (3, 40, 24)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n cut off"])
def test_a_file_that_is_not_an_image_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert len(error.value.lines) == 1
    assert str(error.value).startswith(f"{path}: not an image that can be decoded (")
