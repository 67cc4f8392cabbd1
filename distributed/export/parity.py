"""Compares the logits of an exported file with those of the network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed import rng
from distributed.data.pipeline import DataPipeline
from distributed.export.formats import ExportedModel
from distributed.inference.trained_run import TrainedRun

BATCH = 64


@dataclass(frozen=True)
class Reference:
    """Images [64, 3, size, size] in [0, 1], a description of their source, and the network's logits for them."""

    images: Tensor
    source: str
    logits: Tensor


def reference(trained: TrainedRun, data: DataPipeline | None) -> Reference:
    """Return the first test images, or random pixels if there is no data, with the network's logits.

    The logits are computed on images normalized by the pipeline, as in training, not by the exported normalization.
    """
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in trained.normalization)
    if data is None:
        size = trained.image_size
        keys = rng.sample_keys(torch.arange(BATCH * 3 * size**2), seed=0, epoch=0)
        images = rng.integers(keys, "parity", 256).view(BATCH, 3, size, size) / 255
        normalized, source = (images - mean) / deviation, "random pixels"
    else:
        normalized = next(data.evaluation("test")).images[:BATCH].contiguous().float()
        images, source = ((normalized * deviation + mean) * 255).round() / 255, "test images"
    with torch.no_grad():
        return Reference(images.contiguous(), source, trained.network(normalized))


def largest_difference(model: ExportedModel, expected: Reference) -> float:
    """Return the largest absolute difference between logits, over a batch and a single image; infinity if shapes differ."""
    batch, single = model(expected.images), model(expected.images[:1])
    if batch.shape != expected.logits.shape or single.shape != expected.logits[:1].shape:
        return float("inf")
    return max(float((batch - expected.logits).abs().max()), float((single - expected.logits[:1]).abs().max()))
