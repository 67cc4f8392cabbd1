"""A training step and an evaluation: the only code that computes losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline, Split
from distributed.engine.protocol import Engine, Outcome
from distributed.errors import NotFiniteError
from distributed.models.keyed_dropout import use_sample_keys
from distributed.training.losses import PerSample, per_shard
from distributed.training.totals import MetricSums, SplitTotals, TotalsAccumulator
from distributed.training.views import Views


def train_step(
    engine: Engine,
    micro_batches: list[Batch],
    *,
    loss: PerSample,
    lr: float | Tensor,
    step: int | Tensor,
    totals: TotalsAccumulator,
) -> Tensor:
    """Take one optimizer step on this rank's shards of the global batch.

    Computes the gradient of the mean loss over the global batch. Each shard's summed loss is divided by the global
    sample count, so shards and micro-batches may differ in size.

    Returns:
        The gradient's norm before clipping, a scalar on the device.
    """
    shard_loss = partial(_shard_loss, loss)
    for index, batch in enumerate(micro_batches):
        losses, logits = engine.micro_step(shard_loss, batch, last=index == len(micro_batches) - 1)
        totals.add(losses, logits, batch.labels, step=step)
    norm = engine.step(lr, step=step)
    totals.add_step(norm)
    return norm


def _shard_loss(loss: PerSample, model: nn.Module, batch: Batch) -> tuple[Tensor, Outcome]:
    with use_sample_keys(batch.sample_keys):
        logits = _at_least_float32(model(batch.images))
    losses = loss(logits, batch.labels)
    if batch.mixed:
        # A network may return logits of another type than its images.
        losses = torch.lerp(loss(logits, batch.mixed.labels), losses, batch.mixed.own_weight.to(losses.dtype))
    return losses.sum() / batch.global_count, Outcome(losses.detach(), logits.detach())


@torch.no_grad()
def evaluate(
    engine: Engine,
    data: DataPipeline,
    split: Split,
    *,
    loss: PerSample,
    views: Views,
    device: torch.device,
    metrics: Mapping[str, PerSample] | None = None,
    observers: Sequence[Callable[[Tensor, Batch], None]] = (),
) -> SplitTotals:
    """Compute loss, top-1, top-5 and metrics over a split, counting each image once over all ranks. A collective.

    Args:
        views: the views of each image over which logits are averaged.
        metrics: further metrics by name.
        observers: called for every batch of this rank with its logits [n, classes] and the batch.

    Raises:
        NotFiniteError: the loss is infinite or NaN.
        RuntimeError: the images counted over all ranks are not the size of the split.
    """
    own = metrics or {}
    accumulator, sums = TotalsAccumulator(device), MetricSums(list(own), device)
    with engine.evaluating():
        for batch in data.evaluation(split):
            logits = views.average(partial(_logits, engine, batch), batch.images)
            accumulator.add(per_shard(loss, logits, batch.labels, batch.shard_sizes), logits, batch.labels)
            for name, metric in own.items():
                sums.add(name, per_shard(metric, logits, batch.labels, batch.shard_sizes))
            for observe in observers:
                observe(logits, batch)
    totals = accumulator.read()
    means = sums.read()
    if totals.first_bad_step is not None:
        raise NotFiniteError(
            f"the {split} loss is not finite: set a lower optim.lr, or optim.max_grad_norm, in a new run, which may start from "
            "an earlier checkpoint of this one with init_from"
        )
    if totals.count != data.size(split):
        raise RuntimeError(f"evaluation counted {totals.count} images, but the {split} split has {data.size(split)}")
    return SplitTotals(**vars(totals), metrics=means)


def _logits(engine: Engine, batch: Batch, images: Tensor) -> Tensor:
    """Return the logits of other images in the place of a batch's own."""
    return _at_least_float32(engine.predict(replace(batch, images=images)))


def _at_least_float32(logits: Tensor) -> Tensor:
    """Widen logits for the loss: in bfloat16 it would have two significant digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
