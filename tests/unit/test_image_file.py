import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

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


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x010E, 11, struct.pack("<f", 1.0)), (0x011A, 7, b"abcd"), (0x0100, 9, struct.pack("<i", -5))],
    ids=["a text as a number", "a number as bytes", "a negative size"],
)
def test_an_image_is_turned_whatever_its_other_tags_are(tmp_path: Path, tag: int, kind: int, value: bytes) -> None:
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif += struct.pack("<HHI4sI", tag, kind, 1, value, 0)
    Image.fromarray(PIXELS).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").shape == (3, 40, 24)
    assert decode(tmp_path / "image.jpg").shape == (3, 40, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(tmp_path / "image.png").permute(1, 2, 0).numpy(), expected)


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
    assert str(error.value).startswith(f"{path}: not an image that can be decoded (broken, or in an unknown format)")
