"""Replicated weights: torch's DistributedDataParallel finds the gradients, this engine says how they are summed."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.collectives import world_size
from distributed.config.sections import AdamW, Ddp, Sgd
from distributed.data.batch import Batch
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.tensors import Weights, autocast, cast
from distributed.models.sync_batch_norm import SyncBatchNorm, by_ranks, convert_batch_norm
from distributed.row_gather import open_row_gather


def _sum_gradients(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this annotation
) -> torch.futures.Future[Tensor]:
    """The plain sum over ranks. DDP's own hook divides by their number, and a division by three rounds."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: Any = work.get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


def _any_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Outcome]:
    logits = model(batch.images, batch.sample_keys).float()
    losses = logits.logsumexp(1)
    return losses.sum(), Outcome(losses.detach(), logits.detach())


class DdpEngine:
    """An `Engine` whose ranks each hold the whole model; a single process goes without DDP.

    Args:
        model: float32 on the CPU, with its initial weights; taken over.
        example: some images, for the throwaway steps.
        compile: let torch.compile make the forward and backward pass.
    """

    def __init__(
        self,
        config: Ddp,
        model: nn.Module,
        *,
        optim: Sgd | AdamW,
        precision: str,
        channels_last: bool,
        device: torch.device,
        example: Batch,
        timeout_seconds: float,
        compile: bool,
    ) -> None:
        self.device, self.precision = device, precision
        model = cast(model, precision=precision, channels_last=channels_last, device=device)
        if world_size() > 1:
            exchange = by_ranks(open_row_gather(device, timeout_seconds=timeout_seconds))
            model = convert_batch_norm(model, partial(SyncBatchNorm.of, exchange=exchange))
        if compile:
            model.compile()  # in place: names stay as they are
        self._plain = model
        self.model: nn.Module = model
        self.weights = Weights(optim, model)
        if world_size() > 1:
            self._ddp = self._wrapped(model, config)
            self.model = self._ddp
            self._settle(example)

    def _wrapped(self, model: nn.Module, config: Ddp) -> DistributedDataParallel:
        # 2.13 renamed the flag; either way buffers stay as they are, since synchronized statistics agree by themselves.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        no_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {no_buffers: False}
        ddp = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            bucket_cap_mb=config.bucket_mib,
            gradient_as_bucket_view=True,
            **options,
        )
        ddp.register_comm_hook(None, _sum_gradients)
        return ddp

    def _settle(self, example: Batch) -> None:
        """Two throwaway steps, then everything as before.

        DDP lays out its buckets anew after the first step, in the order gradients came in, and from three ranks up
        another layout is another order of sums. A resumed run must not take its first step with the first layout.
        """
        before = {name: tensor.clone() for name, tensor in self._plain.state_dict().items()}
        for _ in range(2):
            self.micro_step(_any_loss, example, last=True)
            self.weights.zero_grad()
        self._plain.load_state_dict(before)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            logits: Tensor = self._plain(batch.images, batch.sample_keys)
            return logits

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        exchange = nullcontext() if last or self.model is self._plain else self._ddp.no_sync()
        with exchange:
            with autocast(self.device, self.precision):
                value, outcome = loss(self.model, batch)
            value.backward()  # type: ignore[no-untyped-call]
        return outcome

    def step(self, lr: float, *, step: int) -> Tensor:
        norm = self.weights.update(lr, step=step)
        self.weights.zero_grad()
        return norm

    def evaluating(self) -> AbstractContextManager[None]:
        return self.weights.evaluated()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.load(tensors)
