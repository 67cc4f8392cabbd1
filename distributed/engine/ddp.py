"""Replicated weights: torch's DistributedDataParallel finds the gradients, this engine says how they are summed."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.comm.all_gather import open_all_gather
from distributed.comm.collectives import world_size
from distributed.config.engines import Ddp
from distributed.config.sections import AdamW, Sgd
from distributed.data.batch import Batch
from distributed.engine.model_state import ModelState, autocast, cast
from distributed.engine.protocol import Loss, Outcome
from distributed.models.fused_batch_norm import synchronize_batch_norm


class BucketSums:
    """How a bucket of gradients is summed over ranks: in its own type or, rounded, in a lower one.

    `reduced_bytes` is what was all-reduced so far.
    """

    def __init__(self, low: torch.dtype | None) -> None:
        self.low, self.reduced_bytes = low, 0

    def hook(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this annotation
    ) -> torch.futures.Future[Tensor]:
        """The plain sum over ranks. DDP's own hooks divide by their number, and a division by three rounds."""
        buffer = bucket.buffer()
        sent = buffer.to(self.low or buffer.dtype)
        self.reduced_bytes += sent.nbytes
        future: Any = dist.all_reduce(sent, async_op=True).get_future()
        return future.then(  # type: ignore[no-any-return]
            lambda done: done.value()[0] if self.low is None else buffer.copy_(done.value()[0])
        )


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
            model = synchronize_batch_norm(model, open_all_gather(device, timeout_seconds=timeout_seconds))
        if compile:
            model.compile()  # in place: names stay as they are
        self._plain = model
        self.model: nn.Module = model
        self.weights = ModelState(optim, model, precision=precision)
        self._sums = BucketSums(torch.bfloat16 if config.compression == "bfloat16" else None)
        self._untold = world_size() > 1
        if world_size() > 1:
            self._ddp = self._wrapped(model, config)
            self.model = self._ddp
            self._settle(example)

    @property
    def reduced_bytes(self) -> int:
        """What of gradients this rank handed to all-reduces so far."""
        return self._sums.reduced_bytes

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
        ddp.register_comm_hook(None, self._sums.hook)
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
        self._sums.reduced_bytes = 0

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
            self.weights.scale_loss(value).backward()  # type: ignore[no-untyped-call]
        return outcome

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        if self._untold:
            self._untold = False
            logger.debug("gradients: {:,} bytes all-reduced a step", self.reduced_bytes)
        norm = self.weights.step(lr, step=step)
        self.weights.zero_grad()
        return norm

    def evaluating(self) -> AbstractContextManager[None]:
        return self.weights.evaluating()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.load(tensors)
