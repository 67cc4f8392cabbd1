"""Chooses how a training step runs on a device: eagerly, with inputs in fixed memory, or as a CUDA graph."""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.engines import DeepSpeed
from distributed.data.batch import Batch
from distributed.engine.protocol import Engine
from distributed.training.cuda_graph_step import CudaGraphStep
from distributed.training.losses import PerSample
from distributed.training.steps import train_step
from distributed.training.totals import MetricAccumulator


class StepFunction(Protocol):
    """Takes one optimizer step on these micro-batches and returns the gradient's norm, a scalar on the device."""

    def __call__(self, micro_batches: list[Batch], *, lr: float, step: int) -> Tensor: ...


def build_step(
    config: TrainConfig, engine: Engine, metrics: MetricAccumulator, device: torch.device, loss: PerSample
) -> StepFunction:
    """Build the step function: `train_step`, on CUDA with inputs in fixed memory and, on a single GPU, as a CUDA graph."""
    if device.type != "cuda" or (isinstance(config.engine, DeepSpeed) and collectives.world_size() > 1):
        return partial(train_step, engine, loss=loss, metrics=metrics)
    # Checkpointing reads the generators' states, which a capture forbids.
    capture = config.cuda_graphs and collectives.world_size() == 1 and not config.grad_checkpointing.enabled
    return CudaGraphStep(engine, metrics, loss=loss, device=device, capture=capture)
