"""Sharded weights: torch's FSDP2 gathers each layer's for as long as it computes, and scatters what gradients are summed to.

The optimizer works on this rank's parts alone, which are plain tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distributed.comm.all_gather import open_all_gather
from distributed.comm.collectives import world_size
from distributed.config.engines import Fsdp
from distributed.config.sections import AdamW, Sgd
from distributed.data.batch import Batch
from distributed.engine.model_state import ModelState, autocast, cast, low_type
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.sharding import LocalTensor, Replicated
from distributed.models.fused_batch_norm import synchronize_batch_norm


class FsdpEngine:
    """An `Engine` whose ranks each hold a part of every parameter, of its gradient and of what the optimizer keeps of it.

    Args:
        model: float32 on the CPU, with its initial weights; taken over.

    Needs a process group.
    """

    def __init__(
        self,
        config: Fsdp,
        model: nn.Module,
        *,
        optim: Sgd | AdamW,
        precision: str,
        channels_last: bool,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.device, self.precision = device, precision
        # FSDP2 takes no parameters that are not contiguous, whatever the images' layout.
        model = cast(model, precision=precision, channels_last=False, device=device)
        model = synchronize_batch_norm(model, open_all_gather(device, timeout_seconds=timeout_seconds))
        mesh = init_device_mesh(device.type, (world_size(),))
        # What autocast would cast once a use is cast before it is sent; gradients are summed in float32 all the same.
        low = low_type(precision)
        products = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
        for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            fully_shard(layer, mesh=mesh, mp_policy=products, reshard_after_forward=config.reshard_after_forward)
        self.model: Any = fully_shard(model, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            # The plain sum over ranks: each rank's loss is its part of the mean already.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self.weights = ModelState(optim, model, precision=precision, layout=Sharded())

    def predict(self, batch: Batch) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.precision):
            logits: Tensor = self.model(batch.images, batch.sample_keys)
            return logits

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        self.model.set_requires_gradient_sync(last)
        with autocast(self.device, self.precision):
            value, outcome = loss(self.model, batch)
        self.weights.scaled(value).backward()  # type: ignore[no-untyped-call]
        return outcome

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        norm = self.weights.update(lr, step=step)
        self.weights.zero_grad()
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self.weights.evaluated():
            yield
            # A forward pass without a backward one leaves the outermost unit's parameters gathered.
            for unit in self._units:
                unit.reshard()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.load(tensors)


class Sharded:
    """A `Layout`: parameters are cut into runs of rows, buffers are whole."""

    def held(self, name: str, tensor: Tensor) -> LocalTensor:
        if isinstance(tensor, DTensor):
            return LocalTensor(tensor.to_local().detach(), Rows(tensor))
        return LocalTensor(tensor, Replicated(tensor.shape))

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        assert isinstance(parameter.grad, DTensor)
        return parameter.grad.to_local()

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        squares = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()


class Rows:
    """A `Placement`: as many runs of rows as there are ranks, the last ones shorter or empty, as torch.chunk cuts."""

    def __init__(self, like: DTensor) -> None:
        self.shape, self._stride = like.shape, like.stride()
        self._mesh, self._placements = like.device_mesh, like.placements

    def whole(self, part: Tensor) -> Tensor:
        return DTensor.from_local(
            part, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        ).full_tensor()

    def cut(self, whole: Tensor) -> Tensor:
        rows, place = whole.chunk(self._mesh.size()), self._mesh.get_local_rank()
        return rows[place] if place < len(rows) else whole[:0]
