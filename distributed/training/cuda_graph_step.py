"""A training step on CUDA, captured once per batch shape and replayed as one CUDA graph.

At small batch sizes the GPU waits for Python to launch some hundreds of kernels per step; a replay launches them all at once.
What is captured is `train_step` itself, with its inputs in fixed memory, so a replayed step has the bits of an eager one.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distributed.config.sections import Loss
from distributed.data.batch import Batch, Mixed
from distributed.engine.protocol import Engine
from distributed.training.steps import train_step
from distributed.training.totals import MetricAccumulator

_STEPS_BEFORE = 2
"""Eager steps per shape before capture, in which libraries choose kernels and allocate workspaces."""


class CudaStep:
    """Runs training steps whose inputs are in fixed device memory.

    Args:
        capture: whether to capture steps and replay them; they must not contain collectives.
    """

    def __init__(
        self, engine: Engine, sums: MetricAccumulator, *, loss: Loss, device: torch.device, capture: bool
    ) -> None:
        self._engine, self._sums, self._loss, self._capture = engine, sums, loss, capture
        # Always a tensor: CUDA's optimizers compute in double with a Python number, in float32 with a tensor.
        self._lr = torch.zeros((), device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._norm = torch.zeros((), device=device)
        self._shapes: dict[Any, _Shape] = {}
        self._pool: Any = None

    def __call__(self, micro_batches: list[Batch], *, lr: float, step: int) -> Tensor:
        """One optimizer step; the gradient's norm, a scalar on the device that the next step overwrites."""
        self._lr.fill_(lr)
        self._step.fill_(step)
        key = tuple((batch.global_count, batch.shard_sizes, batch.mixed is not None) for batch in micro_batches)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape([_copy_of(batch) for batch in micro_batches])
        else:
            shape.fill(micro_batches)
        if self._capture and shape.graph is None and shape.steps == _STEPS_BEFORE:
            shape.graph = self._captured(shape)
        if shape.graph:
            shape.graph.replay()
        else:
            self._take(shape)
            shape.steps += 1
        return self._norm

    def _take(self, shape: "_Shape") -> None:
        norm = train_step(
            self._engine, shape.micro_batches, loss=self._loss, lr=self._lr, step=self._step, sums=self._sums
        )
        self._norm = self._norm.to(norm.dtype)  # of float64 weights, once
        self._norm.copy_(norm)

    def _captured(self, shape: "_Shape") -> torch.cuda.CUDAGraph:
        """The step as a graph; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Thread-local: the checkpoint writer and the prefetching thread may synchronize during capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._take(shape)
        return graph


class _Shape:
    """The fixed memory of a step's micro-batches, how many steps were taken there, and the graph once captured."""

    def __init__(self, micro_batches: list[Batch]) -> None:
        self.micro_batches, self.steps = micro_batches, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, micro_batches: list[Batch]) -> None:
        here = [tensor for batch in self.micro_batches for tensor in _tensors_of(batch)]
        torch._foreach_copy_(here, [tensor for batch in micro_batches for tensor in _tensors_of(batch)])


def _tensors_of(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.labels, batch.sample_ids, batch.sample_keys, *(batch.mixed or ())]


def _copy_of(batch: Batch) -> Batch:
    images, labels, ids, keys, *mixed = [tensor.clone() for tensor in _tensors_of(batch)]
    return replace(
        batch, images=images, labels=labels, sample_ids=ids, sample_keys=keys, mixed=Mixed(*mixed) if mixed else None
    )
