"""Builds the components of a run from its config, and logs what was built."""

from typing import Any

import torch
from loguru import logger

from distributed.checkpoint.checkpointer import Checkpointer
from distributed.checkpoint.save_budget import SaveBudget
from distributed.comm import collectives
from distributed.comm.process_group import check_own_gpu
from distributed.config import TrainConfig, as_toml
from distributed.config.engines import Ddp, DeepSpeed, Fsdp
from distributed.config.models import BuiltInModel, FastAlexNet, ImportedModel
from distributed.data.batch import Batching, InputFormat, Shards
from distributed.data.pipeline import DataPipeline
from distributed.data.sources import registry
from distributed.data.sources.arrays import GivenArrays
from distributed.engine.ddp import DdpEngine
from distributed.engine.exact import ExactEngine
from distributed.engine.prepare import Compute
from distributed.engine.protocol import Engine
from distributed.errors import InputError, counted, reported_once
from distributed.host.cpu_quota import quota_note
from distributed.models.grad_checkpointing import blocks_to_checkpoint
from distributed.network import Network, build_network, check_same_weights, whiten_first_layer
from distributed.run.claim import ClaimedRun
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.precision import slow_precision
from distributed.training.state import TrainState


def build_data(
    config: TrainConfig, topology: Topology, device: torch.device, given: GivenArrays | None = None
) -> DataPipeline:
    """Build the data pipeline, downloading and decoding if necessary, so call it before peers wait in a process group.

    Args:
        given: the arrays that Python code gave for the import path in the config.

    Raises:
        InputError: the data cannot be read, its images are too small for a setting, or there are too many ranks.
    """
    with reported_once(topology.local_rank):
        config.check_world_size(topology.world_size, device.type)
        registry.fetch_missing(config.data)
        data = DataPipeline(
            config.data,
            Batching(
                seed=config.seed,
                global_batch_size=config.global_batch_size,
                grad_accum_steps=config.grad_accum_steps,
                evaluation_batch_size=config.evaluation.batch_size,
            ),
            Shards.of_rank(topology.rank, topology.world_size, config.shards_on(device.type) or topology.world_size),
            InputFormat(
                device,
                dtype=torch.float64 if config.precision == "float64" else torch.float32,
                channels_last=config.channels_last,
                resized_side=config.resized_side,
                repeats_channel=isinstance(config.model, BuiltInModel),
            ),
            decoded_side=config.decoded_side,
            given=given,
        )
        height, width = data.raw_images(1).shape[1:3]
        if conflicts := config.size_conflicts(height, width):
            raise InputError(*conflicts)
        return data


def read_data(config: TrainConfig) -> DataPipeline:
    """Build the run's data pipeline for a single process on the CPU in float32, e.g. for analyzing a trained network.

    The module of an augmentation function need not be there.
    """
    augment = config.data.augment.model_copy(update={"function": None})
    data = config.data.model_copy(update={"augment": augment})
    return build_data(config.model_copy(update={"precision": "float32", "data": data}), Topology(), torch.device("cpu"))


def _has_saved_since_init(config: TrainConfig) -> bool:
    """Whether a run with `init_from` has saved since, so that no rank uses those weights. A collective if it is set.

    Other ranks may have looked before an earlier attempt committed its first checkpoint, and have read them.
    """
    return bool(config.init_from and collectives.run_on_main(lambda: RunFolder(config.run_dir).has_saved()))


def build_engine(
    config: TrainConfig,
    topology: Topology,
    data: DataPipeline,
    device: torch.device,
    network: Network | None = None,
) -> Engine:
    """Build the network's engine. A single process has nothing to shard and uses `DdpEngine` in fast mode.

    Args:
        network: the result of `build_network`, if it was called before.
    """
    model, layers, conditional = network or build_network(config, topology, data)
    if (isinstance(config.model, ImportedModel) or config.init_from) and not _has_saved_since_init(config):
        check_same_weights(model, name=config.model.name, init_from=config.init_from)
    if isinstance(config.model, FastAlexNet) and config.model.whitening and not config.init_from:
        whiten_first_layer(model, data)
    blocks = blocks_to_checkpoint(model, config.grad_checkpointing)
    compute = Compute(config.precision, config.channels_last, device, config.timeout_seconds, tuple(blocks))
    engine, optim, multiple_ranks = config.engine, config.optim, topology.world_size > 1
    if isinstance(engine, DeepSpeed) and multiple_ranks:
        check_own_gpu(device, "engine.name = deepspeed")
        from distributed.engine.deepspeed import DeepSpeedEngine  # slow to import, like FSDP2

        accumulate = config.grad_accum_steps
        return DeepSpeedEngine(engine, model, optim=optim, compute=compute, grad_accum_steps=accumulate)
    if isinstance(engine, DeepSpeed):
        engine = _without_sharding(engine)
    if shards := config.shards_on(device.type):
        workers = shard_workers(device, threads=topology.threads(config.threads))
        return ExactEngine(engine, model, optim=optim, compute=compute, shards=shards, workers=workers, layers=layers)
    if isinstance(engine, Fsdp) and multiple_ranks:
        check_own_gpu(device, "engine.name = fsdp in fast mode")
        from distributed.engine.fsdp import FsdpEngine

        return FsdpEngine(engine, model, optim=optim, compute=compute, layers=layers)
    if isinstance(engine, Fsdp):
        engine = _without_sharding(engine)
    return DdpEngine(
        engine, model, optim=optim, compute=compute, example=data.example(), compile=config.compile,
        conditional=conditional,
    )  # fmt: skip


def _without_sharding(engine: DeepSpeed | Fsdp) -> Ddp:
    """Return the engine config for a single process, which has nothing to shard."""
    if isinstance(engine, DeepSpeed) and engine.offload_optimizer:
        raise InputError("engine.offload_optimizer = true needs several processes; start more, or remove it")
    logger.info("engine {}: not sharded, because there is only one process", engine.name)
    return Ddp()


def shard_workers(device: torch.device, *, threads: int) -> int:
    """Return the number of worker threads in exact mode.

    One on CUDA, where kernels run beside each other anyway and more workers would only contend for the GIL.
    """
    return 1 if device.type == "cuda" else threads


def build_checkpointer(config: TrainConfig, run: ClaimedRun | None, metadata: dict[str, Any]) -> Checkpointer:
    """Build the checkpointer of a run; `run` is its claimed folder on rank 0 and None on the other ranks."""
    return Checkpointer(
        RunFolder(config.run_dir).checkpoints,
        run,
        keep_last=config.checkpoint.keep_last,
        metadata=metadata,
        upload_to=config.checkpoint.upload_to,
        budget=SaveBudget(config.checkpoint.max_overhead),
    )


def log_plan(
    config: TrainConfig, topology: Topology, data: DataPipeline, device: torch.device, state: TrainState
) -> None:
    """Log the model and data, the batch arithmetic, the mode and the starting point, on rank 0."""
    if not topology.is_main:
        return
    for line in as_toml(config).splitlines():
        logger.debug("config: {}", line)
    logger.info(
        "{} on {}: {:,} training images, {:,} validation, {:,} test; {} per epoch, {}",
        config.model.name, config.data.name, data.size("train"), data.size("validation"), data.size("test"),
        counted(data.steps_per_epoch, "step"), counted(config.epochs, "epoch"),
    )  # fmt: skip
    _log_batch(config, topology, device)
    _log_mode(config, topology, device)
    logger.info("run folder {}", config.run_dir)
    if state.epoch >= config.epochs:  # a second attempt waited for the one that finished it
        logger.info("all {} are done: nothing is left to train", counted(config.epochs, "epoch"))
    elif state.step:
        logger.info(
            "resuming at step {}: epoch {}, step {} of {}",
            state.step, state.epoch + 1, state.step_in_epoch, data.steps_per_epoch,
        )  # fmt: skip


def _log_batch(config: TrainConfig, topology: Topology, device: torch.device) -> None:
    """Log how the global batch is divided, and warn about threads without work."""
    world_size, threads = topology.world_size, topology.threads(config.threads)
    micro = -(-config.global_batch_size // config.grad_accum_steps)
    shards = config.shards_on(device.type)
    per_rank = f"{shards} shards, {_spread(shards, world_size)}" if shards else _spread(micro, world_size)
    logger.info(
        "global batch {} = {} of {}, {} per rank; {} x {}, {}, peak lr {:g}",
        config.global_batch_size, counted(config.grad_accum_steps, "micro-batch", "es"), micro, per_rank,
        counted(world_size, "rank"), counted(threads, "thread"), config.precision, config.peak_lr,
    )  # fmt: skip
    if note := quota_note():
        logger.info(note)
    if device.type == "cpu" and 0 < (busy := -(-shards // world_size)) < threads:
        logger.warning(
            "{} of {} threads per rank are idle: each shard uses one; a new run with more exact.shards would use more",
            threads - busy, threads,
        )  # fmt: skip


def _log_mode(config: TrainConfig, topology: Topology, device: torch.device) -> None:
    """Log the engine and what the results depend on."""
    shards = config.shards_on(device.type)
    stage = f" at stage {config.engine.zero_stage}" if isinstance(config.engine, DeepSpeed) else ""
    logger.info(
        "engine {}{}; {}", config.engine.name, stage,
        f"exact mode, {shards} shards: bit-identical on up to {shards} processes" if shards
        else "fast mode: results depend on the number of processes",
    )  # fmt: skip
    if slow := slow_precision(config, device):
        logger.warning(slow)
    if config.compression:
        sends_nothing = topology.world_size == 1
        logger.info(
            "engine.compression = {}: gradients are approximate, and the bits depend on the number of processes{}",
            config.compression, "; a single process sends and rounds nothing" if sends_nothing else "",
        )  # fmt: skip


def _spread(count: int, world_size: int) -> str:
    least, most = count // world_size, -(-count // world_size)
    return f"{least}" if least == most else f"{least} to {most}"
