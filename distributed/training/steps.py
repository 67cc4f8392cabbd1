"""One training step and one evaluation: the only code that touches losses and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed.config import sections
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline, Split
from distributed.engine.protocol import Engine, Outcome
from distributed.errors import NotFiniteError
from distributed.training.totals import MetricAccumulator, Totals


def train_step(
    engine: Engine,
    micro_batches: list[Batch],
    *,
    loss: sections.Loss,
    lr: float | Tensor,
    step: int | Tensor,
    sums: MetricAccumulator,
) -> Tensor:
    """One optimizer step over this rank's shards of the global batch; the gradient's norm, a scalar on the device.

    The gradient is that of the mean loss over the whole step: each shard's sum is divided by the global count, so
    shards and micro-batches of any size weigh right.
    """
    of_shard = partial(_loss, loss.label_smoothing)
    for index, batch in enumerate(micro_batches):
        losses, logits = engine.micro_step(of_shard, batch, last=index == len(micro_batches) - 1)
        sums.add(losses, logits, batch.labels, step=step)
    norm = engine.step(lr, step=step)
    sums.add_step(norm)
    return norm


def _loss(label_smoothing: float, model: nn.Module, batch: Batch) -> tuple[Tensor, Outcome]:
    logits = _wide(model(batch.images, batch.sample_keys))
    cross_entropy = partial(F.cross_entropy, logits, reduction="none", label_smoothing=label_smoothing)
    losses = cross_entropy(batch.labels)
    if batch.mixed:
        losses = torch.lerp(cross_entropy(batch.mixed.labels), losses, batch.mixed.own_weight)
    return losses.sum() / batch.global_count, Outcome(losses.detach(), logits.detach())


@torch.no_grad()
def evaluate(
    engine: Engine,
    data: DataPipeline,
    split: Split,
    *,
    flip_tta: bool,
    device: torch.device,
    observers: Sequence[Callable[[Tensor, Batch], None]] = (),
) -> Totals:
    """Loss, top-1 and top-5 over a split, each image counted once, on all ranks together.

    Args:
        flip_tta: take the mean of each image's logits and those of its mirror image.
        observers: each is called with the logits [n, classes] of every batch of this rank, and the batch.

    Raises:
        NotFiniteError: the loss is infinite or no number.
        RuntimeError: the count over all ranks is not the size of the split.
    """
    sums = MetricAccumulator(device)
    with engine.evaluating():
        for batch in data.evaluation(split):
            logits = _wide(engine.predict(batch))
            if flip_tta:
                logits = (logits + _wide(engine.predict(replace(batch, images=batch.images.flip(3))))) / 2
            sums.add(F.cross_entropy(logits, batch.labels, reduction="none"), logits, batch.labels)
            for observe in observers:
                observe(logits, batch)
    totals = sums.read()
    if totals.first_bad_step is not None:
        raise NotFiniteError(f"the {split} loss is not finite: lower optim.lr, or set optim.max_grad_norm")
    if totals.count != data.size(split):
        raise RuntimeError(f"evaluation counted {totals.count} images of the {split} split's {data.size(split)}")
    return totals


def _wide(logits: Tensor) -> Tensor:
    """At least float32: a loss in bfloat16 has two digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
