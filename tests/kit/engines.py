"""Builds every engine in one process group, takes steps with it and compares the results."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed.build import build_data, build_engine
from distributed.comm import collectives, shared_sum
from distributed.config import TrainConfig
from distributed.data.pipeline import DataPipeline
from distributed.engine.protocol import Engine
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator
from kit.small_runs import FAST, small_config

CPU = torch.device("cpu")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "zero 0": {"name": "deepspeed", "zero_stage": 0},
    "zero 1": {"name": "deepspeed", "zero_stage": 1},
    "zero 2": {"name": "deepspeed", "zero_stage": 2},
    "zero 3": {"name": "deepspeed", "zero_stage": 3},
}
SHARDED = [name for name in ENGINES if name not in ("ddp", "zero 0")]


def config_with(engine: str, run_dir: Path = Path("unused"), **settings: Any) -> TrainConfig:
    """Return a config for fast mode in contiguous memory, the one layout in which all engines use the same kernels."""
    return small_config(run_dir, engine=ENGINES[engine], exact=FAST, channels_last=False, **settings)


def use_process_group() -> None:
    """From now on, let fast mode sum this rank's gradients over the process group, like ranks on several hosts."""
    vars(shared_sum)["open_shared_memory"] = lambda size, device: None


def built(config: TrainConfig) -> tuple[Engine, DataPipeline]:
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    return build_engine(config, topology, data, CPU), data


def steps(
    engine: Engine,
    data: DataPipeline,
    config: TrainConfig,
    *,
    lr: float,
    first: int = 0,
    count: int = 1,
    device: torch.device = CPU,
) -> tuple[list[float], list[float]]:
    """Take `count` steps of the first epoch from step `first`; return their mean losses and gradient norms."""
    sums, losses, norms = TotalsAccumulator(device), list[float](), list[float]()
    batches = data.train_epoch(0, start_step=first)
    for step, micro_batches in zip(range(first, first + count), batches, strict=False):
        norms.append(
            float(
                train_step(
                    engine, micro_batches, loss=build_losses(config.loss).training, lr=lr, step=step, totals=sums
                )
            )
        )
        losses.append(sums.read().mean_loss)
    return losses, norms


def copied(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.state()}


def difference(
    found: dict[str, Tensor], expected: dict[str, Tensor], kind: str, *, ignore: Collection[str] = ()
) -> float:
    """Return the norm of the difference of all tensors of a kind, e.g. `model`, relative to their norm."""
    names = [name for name in expected if name.startswith(f"{kind}.") and expected[name].is_floating_point()]
    names = [name for name in names if name not in ignore]
    squares = torch.stack([(found[name].double() - expected[name].double()).square().sum() for name in names]).sum()
    return float((squares / torch.stack([expected[name].double().square().sum() for name in names]).sum()).sqrt())
