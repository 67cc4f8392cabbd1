"""A training step on CUDA with inputs in fixed memory; on a single GPU captured per batch shape and replayed as a CUDA graph.

At small batch sizes the GPU waits for Python to launch some hundreds of kernels per step; a replay launches them all at once.
The captured function is `train_step` itself with its inputs in fixed memory, so a replayed step is bit-identical to an
eager one.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distributed.data.batch import Batch, Mixed
from distributed.engine.protocol import Engine
from distributed.errors import InputError
from distributed.process.optional_output import one_line
from distributed.training.losses import PerSample
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

_WARM_UP_STEPS = 2
"""Eager steps per shape before capture, in which libraries choose kernels and allocate workspaces."""


class StaticInputStep:
    """Runs training steps whose inputs are in fixed device memory.

    Args:
        capture: whether to capture and replay steps, which must not contain collectives.
    """

    def __init__(
        self, engine: Engine, totals: TotalsAccumulator, *, loss: PerSample, device: torch.device, capture: bool
    ) -> None:
        self._engine, self._totals, self._loss, self._capture = engine, totals, loss, capture
        # Always a tensor: CUDA's optimizers compute in double with a Python number, in float32 with a tensor.
        self._lr = torch.zeros((), device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._norm = torch.zeros((), device=device)
        self._inputs: dict[Any, _StaticInputs] = {}
        self._pool: Any = None

    def __call__(self, micro_batches: list[Batch], *, lr: float, step: int) -> Tensor:
        """Take one optimizer step. Returns the gradient's norm, a scalar on the device that the next step overwrites."""
        self._lr.fill_(lr)
        self._step.fill_(step)
        key = tuple(
            (batch.global_count, batch.shard_sizes, batch.images.shape, batch.mixed is not None)
            for batch in micro_batches
        )
        inputs = self._inputs.get(key)
        if inputs is None:
            inputs = self._inputs[key] = _StaticInputs([_clone(batch) for batch in micro_batches])
        else:
            inputs.copy_from(micro_batches)
        if self._capture and inputs.graph is None and inputs.eager_steps == _WARM_UP_STEPS:
            inputs.graph = self._capture_graph(inputs)
        if inputs.graph:
            inputs.graph.replay()
        else:
            self._run(inputs)
            inputs.eager_steps += 1
        return self._norm

    def _run(self, inputs: "_StaticInputs") -> None:
        norm = train_step(
            self._engine, inputs.micro_batches, loss=self._loss, lr=self._lr, step=self._step, totals=self._totals
        )
        self._norm = self._norm.to(norm.dtype)  # changes once, if the weights are float64
        self._norm.copy_(norm)

    def _capture_graph(self, inputs: "_StaticInputs") -> torch.cuda.CUDAGraph:
        """Capture the step without executing it.

        Raises:
            InputError: it waits for the device, or allocates memory on the host.
        """
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Thread-local: the checkpoint writer and the prefetching thread may synchronize during capture.
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a failed capture raises an error of its own
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise InputError(
                f"a step cannot be captured as a CUDA graph: {one_line(cause)}; change what waits for the GPU in the network "
                "or the loss, e.g. .item() or a mask as an index, or set cuda_graphs = false"
            ) from cause
        return graph


class _StaticInputs:
    """Micro-batches of one shape in fixed memory, the number of eager steps taken on them and, once captured, the graph."""

    def __init__(self, micro_batches: list[Batch]) -> None:
        self.micro_batches, self.eager_steps = micro_batches, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def copy_from(self, micro_batches: list[Batch]) -> None:
        own = [tensor for batch in self.micro_batches for tensor in _tensors_of(batch)]
        torch._foreach_copy_(own, [tensor for batch in micro_batches for tensor in _tensors_of(batch)])


def _tensors_of(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.labels, batch.sample_ids, batch.sample_keys, *(batch.mixed or ())]


def _clone(batch: Batch) -> Batch:
    images, labels, ids, keys, *mixed = [tensor.clone() for tensor in _tensors_of(batch)]
    return replace(
        batch, images=images, labels=labels, sample_ids=ids, sample_keys=keys, mixed=Mixed(*mixed) if mixed else None
    )
