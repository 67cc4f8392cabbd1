"""One training step and one evaluation: the only code that touches losses and gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed.data.pipeline import Batch, DataPipeline, Split
from distributed.engine.protocol import Engine, Outcome
from distributed.errors import NotFiniteError
from distributed.sums import RunningSums, Totals


def train_step(engine: Engine, micro_batches: list[Batch], *, lr: float, step: int, sums: RunningSums) -> Tensor:
    """One optimizer step over this rank's shards of the global batch; the gradient's norm, a scalar on the device.

    The gradient is that of the mean loss over the whole step: each shard's sum is divided by the global count, so
    shards and micro-batches of any size weigh right.
    """
    for index, batch in enumerate(micro_batches):
        losses, logits = engine.micro_step(_loss, batch, last=index == len(micro_batches) - 1)
        sums.add(losses, logits, batch.labels, step=step)
    return engine.step(lr)


def _loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Outcome]:
    logits = _wide(model(batch.images, batch.sample_keys))
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    return losses.sum() / batch.step_size, Outcome(losses.detach(), logits.detach())


@torch.no_grad()
def evaluate(
    engine: Engine,
    data: DataPipeline,
    split: Split,
    *,
    device: torch.device,
    observers: Sequence[Callable[[Tensor, Batch], None]] = (),
) -> Totals:
    """Loss, top-1 and top-5 over a split, each image counted once, on all ranks together.

    Args:
        observers: each is called with the logits [n, classes] of every batch of this rank, and the batch.

    Raises:
        NotFiniteError: the loss is infinite or no number.
        RuntimeError: the count over all ranks is not the size of the split.
    """
    engine.model.eval()
    sums = RunningSums(device)
    for batch in data.evaluation(split):
        logits = _wide(engine.predict(batch))
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        sums.add(losses, logits, batch.labels)
        for observe in observers:
            observe(logits, batch)
    engine.model.train()
    totals = sums.read()
    if totals.first_bad_step is not None:
        raise NotFiniteError(
            f"the {split} loss is not finite: lower optim.lr, set optim.clip_norm, or use precision = float32; "
            f"the last checkpoint is from before this epoch's end"
        )
    if totals.count != data.size(split):
        raise RuntimeError(f"evaluation counted {totals.count} images of the {split} split's {data.size(split)}")
    return totals


def _wide(logits: Tensor) -> Tensor:
    """At least float32: a loss in bfloat16 has two digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
