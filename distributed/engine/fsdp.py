"""Sharded weights with torch's FSDP2, which gathers each layer's weights while it computes and reduce-scatters gradients.

The optimizer works on this rank's local tensors only, which are plain tensors.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distributed.comm.collectives import world_size
from distributed.config.engines import Fsdp
from distributed.config.optim import AnyOptim
from distributed.data.batch import Batch
from distributed.engine.model_state import ModelState
from distributed.engine.prepare import Compute, prepare
from distributed.engine.protocol import Loss, Outcome
from distributed.engine.sharding import LocalTensor, Replicated


class FsdpEngine:
    """An `Engine` in which each rank has a shard of every parameter, gradient and optimizer tensor. Needs a process group.

    Args:
        model: float32 on the CPU, with its initial weights; the engine takes ownership.
        layers: names of the layers whose parameters nothing else uses, and only while the layer is called. Each is gathered
            for its own computation; all other parameters are gathered for the entire pass.
    """

    def __init__(
        self,
        config: Fsdp,
        model: nn.Module,
        *,
        optim: AnyOptim,
        compute: Compute,
        layers: Collection[str],
    ) -> None:
        self.compute = compute
        # FSDP2 accepts contiguous parameters only, whatever the layout of the images.
        model = prepare(model, replace(compute, channels_last=False))
        mesh = init_device_mesh(compute.device.type, (world_size(),))
        # Weights are cast before they are gathered, instead of by autocast at each use. Gradients are summed in float32.
        low = compute.low_dtype
        mixed_precision = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False
        )
        for name in layers:
            layer = model.get_submodule(name)
            fully_shard(layer, mesh=mesh, mp_policy=mixed_precision, reshard_after_forward=config.reshard_after_forward)
        self.model: Any = fully_shard(model, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            # A sum over ranks, not a mean: each rank's loss is already its contribution to the global mean.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self.weights = ModelState(optim, model, precision=compute.precision, layout=FsdpLayout())

    def predict(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self.compute.autocast():
            logits: Tensor = self.model(batch.images)
            return logits

    def micro_step(self, loss: Loss, batch: Batch, *, last: bool) -> Outcome:
        self.model.set_requires_gradient_sync(last)
        with self.compute.autocast():
            value, outcome = loss(self.model, batch)
        self.weights.scale_loss(value).backward()  # type: ignore[no-untyped-call]
        return outcome

    def step(self, lr: float | Tensor, *, step: int | Tensor) -> Tensor:
        norm = self.weights.step(lr, step=step)
        self.weights.zero_grad()
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self.weights.evaluating():
            try:
                yield
            finally:
                # After a forward pass without a backward pass the root unit's parameters are still gathered.
                for unit in self._units:
                    unit.reshard()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.state()

    def local_tensors(self) -> dict[str, LocalTensor]:
        return self.weights.local_tensors()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights.load(tensors)


class FsdpLayout:
    """Parameters are sharded by rows, buffers are replicated: a `Layout`."""

    def local_tensor(self, name: str, tensor: Tensor) -> LocalTensor:
        if isinstance(tensor, DTensor):
            return LocalTensor(tensor.to_local().detach(), RowShard(tensor))
        return LocalTensor(tensor, Replicated(tensor.shape))

    def local_gradient(self, name: str, parameter: Tensor) -> Tensor:
        # The loss does not depend on a parameter without a gradient.
        local = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert isinstance(local, DTensor)
        return local.to_local()

    def global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        squares = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()


class RowShard:
    """One contiguous range of rows per rank, split like torch.chunk: the last ones may be shorter or empty. A `Placement`."""

    def __init__(self, like: DTensor) -> None:
        self.shape, self._stride = like.shape, like.stride()
        self._mesh, self._placements = like.device_mesh, like.placements

    def gather(self, local: Tensor) -> Tensor:
        return DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        ).full_tensor()

    def local_part(self, full: Tensor) -> Tensor:
        chunks, rank = full.chunk(self._mesh.size()), self._mesh.get_local_rank()
        return chunks[rank] if rank < len(chunks) else full[:0]
