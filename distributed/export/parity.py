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
    """Images [64, channels, h, w] in [0, 1], a description of their source, and the network's logits for them."""

    images: Tensor
    source: str
    logits: Tensor


def reference(trained: TrainedRun, data: DataPipeline | None) -> Reference:
    """Return the first test images, or random pixels if there is no data, with the network's logits.

    The logits are computed on images normalized by the pipeline, as in training, not by the exported normalization.
    """
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in trained.normalization)
    channels, height, width = trained.input_shape
    if data is None:
        keys = rng.sample_keys(torch.arange(BATCH * channels * height * width), seed=0, epoch=0)
        images = rng.integers(keys, "parity", 256).view(BATCH, channels, height, width) / 255
        normalized, source = (images - mean) / deviation, "random pixels"
    else:
        normalized = next(data.evaluation("test")).images[:BATCH, :channels].contiguous().float()
        images, source = normalized * deviation + mean, "test images"
    with torch.no_grad():
        return Reference(
            images.contiguous(),
            source,
            trained.network(normalized.expand(-1, 3, -1, -1) if trained.classifier.repeats_channel else normalized),
        )


def largest_difference(model: ExportedModel, expected: Reference) -> float:
    """Return the largest absolute difference between logits, over a batch and a single image.

    Infinity if shapes differ, NaN if a logit is NaN.
    """
    batch, single = model(expected.images), model(expected.images[:1])
    if batch.shape != expected.logits.shape or single.shape != expected.logits[:1].shape:
        return float("inf")
    differences = torch.cat([batch - expected.logits, single - expected.logits[:1]])
    return float(differences.abs().max())  # unlike Python's max it propagates NaN
