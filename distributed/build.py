"""From the config to the parts of a run, and the lines that say what was built."""

import hashlib
from functools import partial
from typing import Any, Protocol

import torch
from loguru import logger
from torch import Tensor

from distributed.comm import collectives
from distributed.comm.process_group import check_own_gpu
from distributed.config import TrainConfig, as_toml
from distributed.config.engines import Ddp, DeepSpeed, Fsdp
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline
from distributed.data.sources import registry
from distributed.engine.ddp import DdpEngine
from distributed.engine.exact import ExactEngine
from distributed.engine.protocol import Engine
from distributed.errors import InputError
from distributed.host.cpu_quota import quota_note
from distributed.models.build import build_model
from distributed.topology import Topology
from distributed.training.cuda_graph_step import CudaStep
from distributed.training.state import TrainState
from distributed.training.steps import train_step
from distributed.training.totals import MetricAccumulator


class Step(Protocol):
    """Takes one optimizer step with these micro-batches; returns the gradient's norm, a scalar on the device."""

    def __call__(self, micro_batches: list[Batch], *, lr: float, step: int) -> Tensor: ...


def config_digest(config: TrainConfig) -> str:
    """A digest of all settings, the same for all ranks of a job."""
    return hashlib.blake2b(as_toml(config).encode(), digest_size=8).hexdigest()


def check_same_config(config: TrainConfig) -> None:
    """Raises InputError where the ranks were not all given the same config."""
    digests = collectives.gather_objects(config_digest(config))
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise InputError(
            f"config: rank {', '.join(map(str, different))} was given other settings than rank 0; "
            "start every node with the same command and the same files"
        )


def build_data(config: TrainConfig, topology: Topology, device: torch.device) -> DataPipeline:
    """The images, fetched and decoded if need be: to be called before any process group waits for this node."""
    config.check_world_size(topology.world_size, device.type)
    registry.fetch_missing(config.data)
    return DataPipeline(
        config.data,
        side=config.model.input_side,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        grad_accum_steps=config.grad_accum_steps,
        evaluation_batch_size=config.evaluation.batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
        shards=config.shards_on(device.type) or topology.world_size,
        device=device,
        dtype=torch.float64 if config.precision == "float64" else torch.float32,
        channels_last=config.channels_last,
    )


def read_data(config: TrainConfig) -> DataPipeline:
    """The run's images for a single process on the CPU, in float32: for what is done with a finished network."""
    return build_data(config.model_copy(update={"precision": "float32"}), Topology(), torch.device("cpu"))


def build_engine(config: TrainConfig, topology: Topology, data: DataPipeline, device: torch.device) -> Engine:
    model = build_model(config.model, num_classes=data.num_classes, seed=config.seed)
    common: dict[str, Any] = {
        "optim": config.optim,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "device": device,
        "timeout_seconds": config.timeout_seconds,
    }
    engine = config.engine
    if isinstance(engine, DeepSpeed):
        if topology.world_size > 1:
            check_own_gpu(device, "engine.name = deepspeed")
            from distributed.engine.deepspeed import DeepSpeedEngine  # slow to import, as FSDP2 is

            return DeepSpeedEngine(engine, model, grad_accum_steps=config.grad_accum_steps, **common)
        if engine.offload_optimizer:
            raise InputError("engine.offload_optimizer = true needs several processes: start more, or leave it out")
        logger.info("engine deepspeed: one process, so there is nothing to be shared out")
        engine = Ddp()
    if shards := config.shards_on(device.type):
        lanes = lanes_on(device, threads=topology.threads(config.threads))
        return ExactEngine(engine, model, shards=shards, lanes=lanes, **common)
    if isinstance(engine, Fsdp):
        if topology.world_size > 1:
            check_own_gpu(device, "engine.name = fsdp in fast mode")
            from distributed.engine.fsdp import FsdpEngine

            return FsdpEngine(engine, model, **common)
        logger.info("engine fsdp: one process, so there is nothing to be shared out")
        engine = Ddp()
    return DdpEngine(engine, model, example=data.example(), compile=config.compile, **common)


def lanes_on(device: torch.device, *, threads: int) -> int:
    """Number of worker threads of exact mode. One on CUDA: autograd runs all backward passes on one thread per device, and
    more workers would only contend for the GIL."""
    return 1 if device.type == "cuda" else threads


def build_step(config: TrainConfig, engine: Engine, sums: MetricAccumulator, device: torch.device) -> Step:
    """`train_step` for this engine; on CUDA with its inputs in fixed memory and, on a single GPU, captured."""
    if device.type != "cuda" or (isinstance(config.engine, DeepSpeed) and collectives.world_size() > 1):
        return partial(train_step, engine, loss=config.loss, sums=sums)
    capture = config.cuda_graphs and collectives.world_size() == 1
    return CudaStep(engine, sums, loss=config.loss, device=device, capture=capture)


def log_plan(
    config: TrainConfig, data: DataPipeline, topology: Topology, state: TrainState, device: torch.device
) -> None:
    """Say once what is trained on what, the batch's arithmetic, and where the run starts. Rank 0 is heard."""
    if not topology.is_main:
        return
    for line in as_toml(config).splitlines():
        logger.debug("config: {}", line)
    micro = -(-config.global_batch_size // config.grad_accum_steps)
    threads = topology.threads(config.threads)
    logger.info(
        "{} on {}: {:,} training images, {:,} validation, {:,} test; {} steps an epoch, {} epochs",
        config.model.name, config.data.name, data.size("train"), data.size("validation"), data.size("test"),
        data.steps_per_epoch, config.epochs,
    )  # fmt: skip
    shards, alone = config.shards_on(device.type), topology.world_size == 1
    each = f"{shards} shards, {_spread(shards, topology.world_size)}" if shards else _spread(micro, topology.world_size)
    logger.info(
        "global batch {} = {} micro-batch{} of {}, {} a rank; {} rank{} x {} thread{}, {}, peak lr {:g}",
        config.global_batch_size, config.grad_accum_steps, "es" if config.grad_accum_steps > 1 else "", micro, each,
        topology.world_size, "s" if topology.world_size > 1 else "", threads, "s" if threads > 1 else "",
        config.precision, config.peak_lr,
    )  # fmt: skip
    if note := quota_note():
        logger.info(note)
    stage = f" at stage {config.engine.zero_stage}" if isinstance(config.engine, DeepSpeed) else ""
    logger.info(
        "engine {}{}; {}", config.engine.name, stage,
        f"exact mode, {shards} shards: the same bits on up to {shards} processes" if shards
        else "fast mode: bits depend on the ranks",
    )  # fmt: skip
    if config.precision == "float16" and device.type == "cpu":
        logger.warning(
            "precision = float16 is many times slower than bfloat16 on a CPU, which computes it piece by piece"
        )
    if config.compression:
        logger.info(
            "engine.compression = {}: gradients are approximate, and no other number of processes gives the same bits{}",
            config.compression,
            "; one process sends nothing and rounds nothing" if alone else "",
        )
    if device.type == "cpu" and 0 < (most := -(-shards // topology.world_size)) < threads:
        logger.warning(
            "{} of {} threads a rank have nothing to compute: a shard takes one; a run begun with more exact.shards uses more",
            threads - most, threads,
        )  # fmt: skip
    logger.info("run folder {}", config.run_dir)
    if state.step:
        logger.info("resuming at step {}: epoch {}, step {} of it", state.step, state.epoch + 1, state.step_in_epoch)


def _spread(count: int, world_size: int) -> str:
    least, most = count // world_size, -(-count // world_size)
    return f"{least}" if least == most else f"{least} to {most}"
