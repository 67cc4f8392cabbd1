"""Test-time augmentation: predictions averaged over several views of an image."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed.config.sections import Evaluation


class Views(NamedTuple):
    """The views of an image besides itself.

    flip: its mirror image, and that of every other view.
    shift: the image shifted by this many pixels up and left, and down and right; 0: neither.
    """

    flip: bool = False
    shift: int = 0

    @classmethod
    def of(cls, config: Evaluation) -> "Views":
        """Return the views that a config asks for."""
        return cls(config.flip_tta, config.shift_tta)

    def average(self, predict: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return the logits of images [n, c, h, w], averaged over views; a shifted view counts half."""
        total, weights = None, 0.0
        for view, weight in self._weighted(images):
            # A network may change its input in place.
            logits = predict(view.clone() if self.flip or self.shift else view)
            if self.flip:
                logits = (logits + predict(view.flip(3))) / 2
            total = logits * weight if total is None else total + logits * weight
            weights += weight
        assert total is not None
        return total / weights

    def _weighted(self, images: Tensor) -> Iterator[tuple[Tensor, float]]:
        yield images, 1.0
        if self.shift:
            yield _shifted(images, self.shift, first=2 * self.shift), 0.5
            yield _shifted(images, self.shift, first=0), 0.5


def _shifted(images: Tensor, padding: int, *, first: int) -> Tensor:
    """Return the window of the reflected images that starts at row and column `first`, in the images' memory format."""
    if not len(images):  # of a rank without images, which computes the same views as the others
        return images
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4, mode="reflect")
    return torch.empty_like(images).copy_(padded[:, :, first : first + height, first : first + width])
