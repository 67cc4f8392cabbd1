"""A few training steps without a run folder: how large a run is, how fast, and when it would be finished."""

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain, count, islice
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.build import build_data, build_engine, log_plan
from distributed.checkpoint.download import saved_content
from distributed.comm import collectives
from distributed.comm.process_group import choose_device, process_group
from distributed.comm.same_config import check_same_config
from distributed.config import TrainConfig
from distributed.config.engines import DeepSpeed
from distributed.data.checks import check_data
from distributed.data.pipeline import DataPipeline
from distributed.engine.protocol import Engine
from distributed.metrics.records import peak_memory_mib
from distributed.network import build_initial_network
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.process.allocator import keep_freed_memory
from distributed.process.logs import replace_default_logs
from distributed.run.checkpoint_layout import step_of
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic
from distributed.training.functions import build_functions
from distributed.training.precision import with_precision
from distributed.training.state import TrainState
from distributed.training.step_function import StepFunction, build_step
from distributed.training.totals import TotalsAccumulator

_WARM_UP_STEPS = 3  # in which kernels are chosen, graphs captured and shards tried as a group
_TIMED_STEPS = 5


class _Timing(NamedTuple):
    """Seconds of each timed step on the slowest rank, and the images of all of them."""

    seconds: list[float]
    images: int


def dry_run(config: TrainConfig) -> None:
    """Build everything that a run needs, take eight steps, and print sizes and times on rank 0. Every rank calls this.

    The run folder is not even created, and a checkpoint in it is not loaded.

    Raises:
        InputError: as `train` does.
        NotFiniteError: the loss or a gradient became infinite or NaN in these steps.
    """
    topology = Topology.from_environment()
    replace_default_logs(topology.rank, level=config.logging.level)
    keep_freed_memory()
    torch.set_num_threads(topology.threads(config.threads))
    device = choose_device(config.device, topology)
    make_deterministic(device, precision=config.precision, compile=config.compile)
    with ExitStack() as stack:
        data = build_data(config, topology, device)
        loss = build_functions(config, topology, data, device).loss.training
        network = build_initial_network(config, topology, data)
        trained = {name: p.numel() for name, p in network.model.named_parameters() if p.requires_grad}
        frozen = sum(p.numel() for p in network.model.parameters()) - sum(trained.values())
        stack.enter_context(process_group(topology, device, timeout_seconds=config.timeout_seconds))
        check_same_config(config)
        config = with_precision(config, device, saved_content)
        check_data(config, data)
        engine = build_engine(config, topology, data, device, network)
        schedule = build_schedule(config, steps_per_epoch=data.steps_per_epoch)
        state = TrainState(schedule, build_early_stopping(config.early_stopping), config.precision)
        log_plan(config, topology, data, device, state)
        totals = TotalsAccumulator(device)
        timing = _time_steps(build_step(config, engine, totals, device, loss), totals, data, state)
        peak = torch.tensor([peak_memory_mib(device)], dtype=torch.float64, device=device)
        peak_mib = float(collectives.max_over_ranks_(peak))
        if topology.is_main:
            total = sum(trained.values())
            print(f"parameters    {total:,}{f' and {frozen:,} frozen' if frozen else ''}")
            print(f"memory/rank   {_memory(config, engine, trained)}")
            measured = (
                "allocated on the GPU" if device.type == "cuda" else "resident, with Python, libraries and images"
            )
            print(f"measured peak {peak_mib:,.0f} MiB {measured}")
            print("\n".join(_times(config, data, timing)))
            print(f"run folder    {config.run_dir.absolute()}: nothing was written")


def _time_steps(train_step: StepFunction, totals: TotalsAccumulator, data: DataPipeline, state: TrainState) -> _Timing:
    """Take and time training steps, from the first epoch on whose images have the full size. A collective."""
    device = data.input_format.device
    # On a GPU one step augments the images of several. Limit these to the number of timed steps, so that exactly one timed
    # step does so.
    data.augmented_at_once = min(data.augmented_at_once, _TIMED_STEPS * data.batching.grad_accum_steps)
    first = data.config.augment.low_res_epochs  # smaller images take less time and memory
    epochs = chain.from_iterable(data.train_epoch(epoch, start_step=0) for epoch in count(first))
    batches = islice(epochs, _WARM_UP_STEPS + _TIMED_STEPS)
    seconds, images = list[float](), 0
    start = time.perf_counter()
    for step, micro_batches in enumerate(batches):
        norm = train_step(micro_batches, lr=state.schedule.lr(0), step=step)
        float(norm)  # waits for the device
        now = time.perf_counter()
        if step >= _WARM_UP_STEPS:
            seconds.append(now - start)
            images += micro_batches[0].global_count
        start = now
    state.add(totals.read())
    slowest = collectives.max_over_ranks_(torch.tensor(seconds, dtype=torch.float64, device=device))
    return _Timing(slowest.tolist(), images)


def _memory(config: TrainConfig, engine: Engine, trained: Mapping[str, int]) -> str:
    """Describe the bytes of this rank's tensors, by kind."""
    local = {name: tensor.local for name, tensor in engine.local_tensors().items()}
    sizes = {
        kind: _mib(tensor for name, tensor in local.items() if name.startswith(f"{kind}."))
        for kind in ("model", "optimizer", "ema")
    }
    gradients = _mib(local[f"model.{name}"] for name in trained)
    if isinstance(config.engine, DeepSpeed) and config.engine.zero_stage == 2:
        gradients /= collectives.world_size()
    kinds = {
        "parameters and buffers": sizes["model"],
        "gradients": gradients,
        "optimizer state": sizes["optimizer"],
        "EMA": sizes["ema"],
    }
    return ", ".join(f"{size:,.1f} MiB of {kind}" for kind, size in kinds.items() if size)


def _mib(tensors: Iterable[Tensor]) -> float:
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values()) / 2**20


_UNITS = {"hours": 3600, "minutes": 60, "seconds": 1}


def _times(config: TrainConfig, data: DataPipeline, timing: _Timing) -> list[str]:
    """Return one line for the timed steps and one for the time that is left."""
    per_second = timing.images / sum(timing.seconds)
    steps = config.epochs * data.steps_per_epoch
    done = step_of(RunFolder(config.run_dir).newest_state()) or 0
    seconds = (steps - done) * data.size("train") / data.steps_per_epoch / per_second
    unit, size = next((unit, size) for unit, size in _UNITS.items() if seconds >= 2 * size or size == 1)
    resumed = f", after the {done:,} that the run folder has" if done else ""
    return [
        f"timed steps   {' '.join(f'{seconds:.4g}' for seconds in timing.seconds)} seconds, {per_second:,.0f} images/s",
        f"to finish     {seconds / size:.3g} {unit}: {steps - done:,} steps{resumed}; evaluation and saves not included",
    ]
