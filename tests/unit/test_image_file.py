from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.data.sources.image_file import png_of, read_image
from distributed.errors import InputError
from distributed.predict import _input

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "jpg", "bmp"])
def test_every_common_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    smooth = np.asarray(Image.fromarray(PIXELS).resize((4, 3)).resize((40, 24)))
    Image.fromarray(smooth).save(path, **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(path)
    assert (image.shape, image.dtype) == ((3, 24, 40), torch.float32)
    expected = torch.from_numpy(smooth.copy()).permute(2, 0, 1) / 255
    if suffix in ("png", "webp", "bmp"):
        assert torch.equal(image, expected)
    else:
        assert (image - expected).abs().mean() < 0.05


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "I;16"])
def test_every_kind_of_png_is_three_channels_in_0_to_1(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    if mode == "I;16":
        Image.fromarray(np.full((24, 40), 65535, np.uint16)).save(path)
    else:
        Image.fromarray(PIXELS).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 24, 40)
    assert image.min() >= 0
    assert 0.9 < image.max() <= 1
    if mode == "I;16":
        assert torch.equal(image, torch.ones(3, 24, 40))


def test_an_image_that_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    image = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    (tmp_path / "image.png").write_bytes(png_of(image))
    assert torch.equal(read_image(tmp_path / "image.png"), image)


def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(PIXELS).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").shape == (3, 40, 24)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n cut off"])
def test_what_is_no_image_is_one_line_that_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert len(error.value.lines) == 1
    assert str(error.value).startswith(f"{path}: no image that can be decoded (")


def test_the_largest_centered_square_is_scaled_to_the_side() -> None:
    image = torch.zeros(3, 40, 60)
    image[:, :, 10:50] = 1  # the square; outside of it nothing may count
    found = _input(image, 32)
    assert found.shape == (1, 3, 32, 32)
    torch.testing.assert_close(found[..., 1:-1], torch.ones(1, 3, 32, 30))  # at the border the filter reaches beyond


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = torch.randint(256, (3, 32, 32)) / 255
    assert torch.equal(_input(image, 32)[0], image)


def test_scaling_down_averages_what_scaling_without_antialiasing_would_skip() -> None:
    stripes = (torch.arange(256) % 2).float().expand(3, 256, 256)
    assert (_input(stripes, 32) - 0.5).abs().max() < 0.05
