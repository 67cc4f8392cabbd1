"""Replicated weights: torch's DistributedDataParallel finds the gradients, this engine says how they are summed."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.collectives import world_size
from distributed.config.tree import Ddp, Sgd
from distributed.engine.tensors import load_named_state, named_state
from distributed.models.sync_batch_norm import convert_sync_batch_norm
from distributed.optim import build_optimizer
from distributed.row_gather import open_row_gather


def _sum_gradients(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this annotation
) -> torch.futures.Future[Tensor]:
    """The plain sum over ranks. DDP's own hook divides by their number, and a division by three rounds."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: Any = work.get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]


class DdpEngine:
    """An `Engine` whose ranks each hold the whole model; a single process goes without DDP.

    Args:
        model: float32 on the CPU, with its initial weights; taken over.
        example: images [n, c, h, w] and sample keys [n, 2] on `device`, for the throwaway steps.
    """

    def __init__(
        self,
        config: Ddp,
        model: nn.Module,
        *,
        optim: Sgd,
        precision: str,
        channels_last: bool,
        device: torch.device,
        example: tuple[Tensor, Tensor],
        timeout_seconds: float,
    ) -> None:
        self.device, self.precision, self.clip_norm = device, precision, optim.clip_norm
        dtype = torch.float64 if precision == "float64" else torch.float32
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        model = model.to(device, dtype).to(memory_format=memory_format)
        if world_size() > 1:
            model = convert_sync_batch_norm(model, open_row_gather(device, timeout_seconds=timeout_seconds))
        self._plain = model
        self.model: nn.Module = model
        self.optimizer = build_optimizer(optim, model, lr=optim.lr)
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

    def _settle(self, example: tuple[Tensor, Tensor]) -> None:
        """Two throwaway steps, then everything as before.

        DDP lays out its buckets anew after the first step, in the order gradients came in, and from three ranks up
        another layout is another order of sums. A resumed run must not take its first step with the first layout.
        """
        before = {name: tensor.clone() for name, tensor in self._plain.state_dict().items()}
        for _ in range(2):
            with self.micro_step(sync=True):
                self.backward(self.model(*example).float().logsumexp(1).sum())
            self.optimizer.zero_grad(set_to_none=True)
        self._plain.load_state_dict(before)

    def autocast(self) -> AbstractContextManager[None]:
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def micro_step(self, *, sync: bool) -> Iterator[None]:
        exchange = self._ddp.no_sync() if self.model is not self._plain and not sync else nullcontext()
        with exchange, self.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self._plain.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from named_state(self._plain, self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        load_named_state(self._plain, self.optimizer, tensors)
