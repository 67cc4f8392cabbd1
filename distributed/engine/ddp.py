"""Replicated weights. Gradients are summed over the ranks: through shared memory if they are on one host and compute on CPUs,
else bucket by bucket in DistributedDataParallel, or after the backward pass if ranks may use different parameters."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.comm.collectives import world_size
from distributed.config.engines import Ddp
from distributed.config.optim import AnyOptim
from distributed.data.batch import Batch
from distributed.engine.model_state import ModelState
from distributed.engine.prepare import Compute, prepare
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.sharding import LocalTensor
from distributed.engine.shared_gradients import SharedGradients
from distributed.models.keyed_dropout import use_sample_keys


class BucketSums:
    """Sums buckets of gradients over the ranks: in their own dtype or rounded to a lower one.

    `reduced_bytes` counts the bytes all-reduced so far.
    """

    def __init__(self, low: torch.dtype | None) -> None:
        self.low, self.reduced_bytes = low, 0

    def hook(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP requires this annotation
    ) -> torch.futures.Future[Tensor]:
        """Sum a bucket over the ranks. DDP's own hooks average: they divide by world_size, and dividing by 3 rounds."""
        buffer = bucket.buffer()
        sent = buffer.to(self.low or buffer.dtype)
        self.reduced_bytes += sent.nbytes
        future: Any = dist.all_reduce(sent, async_op=True).get_future()
        return future.then(  # type: ignore[no-any-return]
            lambda done: done.value()[0] if self.low is None else buffer.copy_(done.value()[0])
        )


class SumsAfterBackward:
    """Sums all gradients over the ranks after the backward pass: for ranks that use different parameters.

    DDP starts a bucket early on ranks that do not use its parameters, and then the order of collectives, among them those of
    batch norm's backward pass, differs between ranks.
    """

    def __init__(self, parameters: Sequence[Tensor], low: torch.dtype | None) -> None:
        self._parameters, self._low, self.reduced_bytes = parameters, low, 0

    def sum(self) -> None:
        """Replace every `.grad` by its sum over all ranks. A collective."""
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        sent = torch.cat([gradient.reshape(-1).to(self._low or gradient.dtype) for gradient in own])
        dist.all_reduce(sent)
        self.reduced_bytes += sent.nbytes
        sums = torch.split(sent, [gradient.numel() for gradient in own])
        for parameter, gradient, total in zip(self._parameters, own, sums, strict=True):
            parameter.grad = torch.empty_like(gradient).copy_(total.view(gradient.shape))


def _any_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Outcome]:
    with use_sample_keys(batch.sample_keys):
        logits = model(batch.images).float()
    losses = logits.logsumexp(1)
    return losses.sum(), Outcome(losses.detach(), logits.detach())


class DdpEngine:
    """An `Engine` in which every rank has all weights. A single process, and ranks that share memory, run without DDP.

    Args:
        model: float32 on the CPU, with its initial weights; the engine takes ownership.
        example: some images, for a few steps before DDP is used, whose results are discarded.
        compile: compile the forward and backward pass with torch.compile.
        conditional: some images may not use all parameters.
    """

    def __init__(
        self,
        config: Ddp,
        model: nn.Module,
        *,
        optim: AnyOptim,
        compute: Compute,
        example: Batch,
        compile: bool,
        conditional: bool = False,
    ) -> None:
        self._config, self.compute = config, compute
        self._plain = prepare(model, compute)
        if compile:
            # In place, so that parameters keep their names. With dynamic shapes, which kernels a batch gets would depend on
            # the sizes of the batches before it; beyond the limit of shapes, the network would run uncompiled.
            torch._dynamo.config.recompile_limit = 64
            self._plain.compile(dynamic=False)
        self.model = self._plain
        self.weights = ModelState(optim, self._plain, precision=compute.precision)
        self._trained = [p for p in self._plain.parameters() if p.requires_grad]
        self._log_bytes = world_size() > 1
        low = torch.bfloat16 if config.compression == "bfloat16" else None
        self._after: SharedGradients | SumsAfterBackward | None = None
        if world_size() > 1:
            self._after = self._open_shared_gradients(low) or (
                SumsAfterBackward(self._trained, low) if conditional else None
            )
        self._sums = self._after or BucketSums(low)
        self._ddp: DistributedDataParallel | None = None
        if isinstance(self._sums, BucketSums) and world_size() > 1:
            before = [(tensor, tensor.detach().clone()) for tensor in (*self._trained, *self._plain.buffers())]
            self.model = self._ddp = self._wrap(config, self._sums, example)
            self._settle_buckets(example)
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            self._sums.reduced_bytes = 0

    @property
    def summed_by(self) -> str:
        """What sums the gradients over the ranks, and so decides in which order; empty for a single process."""
        if self._ddp:
            return f"DistributedDataParallel, in buckets of {self._config.bucket_mib} MiB"
        if isinstance(self._after, SumsAfterBackward):
            return "one all-reduce after the backward pass"
        return "shared memory" if self._after else ""

    @property
    def reduced_bytes(self) -> int:
        """Bytes of this rank's gradients that were summed over the ranks so far."""
        return self._sums.reduced_bytes

    def _open_shared_gradients(self, low: torch.dtype | None) -> SharedGradients | None:
        timeout = self.compute.timeout_seconds
        return SharedGradients.open(self._trained, low, self.compute.device, timeout_seconds=timeout)

    def _wrap(self, config: Ddp, sums: BucketSums, example: Batch) -> DistributedDataParallel:
        # torch 2.13 renamed the flag. Buffers need no broadcast, since synchronized statistics are the same on all ranks.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        no_broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {no_broadcast: False}
        ddp = DistributedDataParallel(
            self._plain,
            device_ids=[self.compute.device] if self.compute.device.type == "cuda" else None,
            bucket_cap_mb=config.bucket_mib,
            gradient_as_bucket_view=True,
            find_unused_parameters=self._has_unused_parameters(example),
            **options,
        )
        ddp.register_comm_hook(None, sums.hook)
        return ddp

    def _has_unused_parameters(self, example: Batch) -> bool:
        """Return whether a parameter receives no gradient in a step without DDP. Updates the model's buffers."""
        with self.compute.autocast():
            value, _ = _any_loss(self._plain, example)
        value.backward()  # type: ignore[no-untyped-call]
        found = any(parameter.grad is None for parameter in self._trained)
        self.weights.zero_grad()
        return found

    def _settle_buckets(self, example: Batch) -> None:
        """Take two steps without updates, in which the model's buffers change.

        After its first step DDP rebuilds its buckets in the order in which gradients arrived. From three ranks up, other
        buckets mean another order of summation, so a resumed run must not take its first step with the initial buckets.
        """
        for _ in range(2):
            self.micro_step(_any_loss, example, last=True)
            self.weights.zero_grad()

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        with self.compute.autocast():
            logits: Tensor = self._plain(batch.images)
            return logits

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        with nullcontext() if last or self._ddp is None else self._ddp.no_sync():
            with self.compute.autocast():
                value, outcome = loss(self.model, batch)
            self.weights.scale_loss(value).backward()  # type: ignore[no-untyped-call]
        if last and self._after:
            self._after.sum()
        return outcome

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        if self._log_bytes:
            self._log_bytes = False
            logger.debug("gradients: {:,} bytes summed over ranks per step: {}", self.reduced_bytes, self.summed_by)
        norm = self.weights.step(lr, step=step)
        self.weights.zero_grad()
        return norm

    def evaluating(self) -> AbstractContextManager[None]:
        return self.weights.evaluating()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights.state()

    def local_tensors(self) -> dict[str, LocalTensor]:
        return self.weights.local_tensors()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.load(tensors)
