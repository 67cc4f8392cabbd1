"""Test-time augmentation."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distributed.config.sections import Evaluation
from distributed.training.views import Views


def images_of(count: int = 4) -> Tensor:
    images = torch.randn(count, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


def corner(images: Tensor) -> Tensor:
    """A "network" that is sensitive to where things are: the pixel at row 1, column 2."""
    return images[:, :, 1, 2]


def test_shifted_views_count_half_and_reflect_the_border() -> None:
    images = images_of()
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    up_left, down_right = padded[:, :, 4:, 4:], padded[:, :, :-4, :-4]
    expected = (corner(images) + 0.5 * corner(up_left) + 0.5 * corner(down_right)) / 2
    assert torch.allclose(Views(shift=2).average(corner, images), expected)


def test_every_view_is_mirrored_too() -> None:
    images = images_of()
    expected = Views(shift=1).average(lambda view: (corner(view) + corner(view.flip(3))) / 2, images)
    assert not torch.allclose(Views(shift=1).average(corner, images), expected)
    assert torch.allclose(Views(flip=True, shift=1).average(corner, images), expected)


def test_a_network_may_change_its_input() -> None:
    views = Views(flip=True, shift=1)
    found = views.average(lambda view: corner(view.sub_(0.5)), images_of())
    assert torch.allclose(found, views.average(lambda view: corner(view - 0.5), images_of()))


def test_without_views_the_logits_are_unchanged() -> None:
    assert torch.equal(Views().average(corner, images_of()), corner(images_of()))


@pytest.mark.parametrize(("flip", "shift", "calls"), [(False, 0, 1), (True, 0, 2), (False, 3, 3), (True, 1, 6)])
@pytest.mark.parametrize("count", [4, 0])
def test_all_ranks_make_the_same_calls_even_without_images(flip: bool, shift: int, calls: int, count: int) -> None:
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return corner(images)

    views = Views.of(Evaluation(flip_tta=flip, shift_tta=shift))
    assert views.average(predict, images_of(count)).shape == (count, 3)
    assert len(seen) == calls
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
