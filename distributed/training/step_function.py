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
from distributed.training.losses import PerSample
from distributed.training.static_input_step import StaticInputStep
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator


class StepFunction(Protocol):
    """Takes one optimizer step on these micro-batches and returns the gradient's norm, a scalar on the device."""

    def __call__(self, micro_batches: list[Batch], *, lr: float, step: int) -> Tensor: ...


def build_step(
    config: TrainConfig, engine: Engine, totals: TotalsAccumulator, device: torch.device, loss: PerSample
) -> StepFunction:
    """Build the step function: `train_step`, on CUDA with inputs in fixed memory and, on a single GPU, as a CUDA graph."""
    if device.type != "cuda" or (isinstance(config.engine, DeepSpeed) and collectives.world_size() > 1):
        return partial(train_step, engine, loss=loss, totals=totals)
    capture = captures_graphs(config, device, world_size=collectives.world_size())
    return StaticInputStep(engine, totals, loss=loss, device=device, capture=capture)


def captures_graphs(config: TrainConfig, device: torch.device, *, world_size: int) -> bool:
    """Return whether steps become CUDA graphs: a capture forbids collectives, and reading generators as checkpointing does."""
    return device.type == "cuda" and world_size == 1 and config.cuda_graphs and not config.grad_checkpointing.enabled
