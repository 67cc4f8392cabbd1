"""Resizing on the device: the values of torch's antialiased resizing, and bits that do not depend on the batch."""

import pytest
import torch
from torch.nn import functional as F

from distributed.data.resize import resize_and_crop

SHAPES = [
    ((12, 12), 32),
    ((32, 32), 224),
    ((64, 64), 24),
    ((100, 100), 7),
    ((20, 31), 16),
    ((31, 20), 40),
    ((9, 300), 9),
]


def images(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(count, height, width, channels, generator=generator)


def with_torch(batch: torch.Tensor, side: int) -> torch.Tensor:
    height, width = batch.shape[1:3]
    size = [max(side, round(length * side / min(height, width))) for length in (height, width)]
    resized = F.interpolate(batch.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return resized[:, top : top + side, left : left + side]


@pytest.mark.parametrize(("shape", "side"), SHAPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_values_are_those_of_torch(shape: tuple[int, int], side: int, channels: int) -> None:
    batch = images(3, *shape, channels)
    found = resize_and_crop(batch, side)
    assert found.shape == (3, side, side, channels)
    torch.testing.assert_close(found, with_torch(batch, side), rtol=0, atol=5e-5)  # torch has its weights in float32


@pytest.mark.parametrize(("shape", "side"), SHAPES)
def test_the_bits_of_an_image_do_not_depend_on_its_batch(shape: tuple[int, int], side: int) -> None:
    batch = images(7, *shape)
    together = resize_and_crop(batch, side)
    for first, last in ((0, 1), (1, 4), (4, 7), (2, 2)):
        assert torch.equal(resize_and_crop(batch[first:last], side), together[first:last])
    assert torch.equal(resize_and_crop(batch.transpose(1, 2).contiguous().transpose(1, 2), side), together)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    batch = images(2, 16, 16)
    assert torch.equal(resize_and_crop(batch, 16), batch)
    assert torch.equal(resize_and_crop(images(2, 16, 20), 16), images(2, 16, 20)[:, :, 2:18])


def test_a_constant_image_stays_constant() -> None:
    assert torch.allclose(resize_and_crop(torch.full((1, 50, 70, 1), 0.3), 11), torch.tensor(0.3), atol=1e-6)
