"""The images on which an export must say what the network says, and how far it is off."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed import rng
from distributed.data.pipeline import DataPipeline
from distributed.export.formats import Run
from distributed.inference.classifier import Trained

BATCH = 64


@dataclass(frozen=True)
class Reference:
    """Images [64, 3, side, side] in [0, 1], of where they are, and the network's own logits of them."""

    images: Tensor
    source: str
    logits: Tensor


def reference(trained: Trained, data: DataPipeline | None) -> Reference:
    """The first test images, else random pixels, and what the network says of them once they are normalized.

    It is given them as in training: by the pipeline, not by the normalization that is exported.
    """
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in trained.normalization)
    if data is None:
        numbers = torch.arange(BATCH * 3 * trained.side**2)
        shades = rng.integers(rng.sample_keys(numbers, seed=0, epoch=0), "parity", 256)
        images = shades.view(BATCH, 3, trained.side, trained.side) / 255
        normalized, source = (images - mean) / deviation, "random pixels"
    else:
        normalized = next(data.evaluation("test")).images[:BATCH].contiguous().float()
        images, source = ((normalized * deviation + mean) * 255).round() / 255, "test images"
    with torch.no_grad():
        return Reference(images.contiguous(), source, trained.classifier.network(normalized))


def difference(run: Run, to: Reference) -> float:
    """The largest absolute difference of a logit, whether all images are given at once or one by itself."""
    whole, one = run(to.images), run(to.images[:1])
    if whole.shape != to.logits.shape or one.shape != to.logits[:1].shape:
        return float("inf")
    return max(float((whole - to.logits).abs().max()), float((one - to.logits[:1]).abs().max()))
