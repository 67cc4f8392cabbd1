"""Step 6: checks NCCL in a group of one rank: the recipe, each engine, DDP's hook, collectives inside a CUDA graph."""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distributed.build import build_data
from distributed.comm.all_gather import process_group_all_gather
from distributed.comm.collectives import all_gather
from distributed.comm.process_group import choose_device, process_group
from distributed.config import TrainConfig, from_command_line
from distributed.config.engines import Ddp, Fsdp
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline
from distributed.engine.ddp import BucketSums, DdpEngine
from distributed.engine.exact import ExactEngine
from distributed.engine.fsdp import FsdpEngine
from distributed.engine.prepare import Compute
from distributed.engine.protocol import Engine
from distributed.gpu_check import runs
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.graphs import captured
from distributed.gpu_check.processes import Processes
from distributed.models.build import build_model
from distributed.models.keyed_dropout import use_sample_keys
from distributed.models.sync_batch_norm import SyncBatchNorm, convert_batch_norm, one_shard_per_rank
from distributed.network import build_network
from distributed.process import logs
from distributed.recipe import train
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

_SECONDS = 36.0


def run(checks: Checks) -> None:
    topology = Topology.from_environment()
    if not topology.launched:
        _run_as_rank(checks)
        return
    logs.terminal_logs(topology.rank, level="WARNING")
    checks = replace(checks, device=choose_device(checks.device.type, topology))
    with process_group(topology, checks.device, timeout_seconds=20):
        _group(checks)
        _recipe(checks, "fast", exact__shards=0)
        _recipe(checks, "exact", exact__shards=4)
        make_deterministic(checks.device, precision="float32")  # the recipe restores torch's settings
        for precision in ("float64",) if checks.tiny else ("float64", "bfloat16"):
            _engines(checks, precision)
        _wrapped_by_ddp(checks)
        if checks.is_cuda:
            _collectives_in_a_graph(checks)
            _recipe(checks, "fast, after a graph", exact__shards=0)


def _run_as_rank(checks: Checks) -> None:
    """Run this step again as a launched rank, and print its checks."""
    with Processes(checks.scratch, seconds=_SECONDS) as processes:
        step = [
            "distributed.gpu_check.steps",
            "distributed.gpu_check.nccl",
            str(checks.device),
            str(int(checks.tiny)),
            checks.out,
            checks.scratch,
        ]
        (rank,) = processes.start_ranks("nccl", 1, *map(str, step))
        try:
            code = rank.wait()
        finally:
            sys.stdout.write(rank.text)
        if code != 0:
            raise RuntimeError(f"the rank exited with code {code}")


def _group(checks: Checks) -> None:
    with checks.check("process group") as figures:
        backend = dist.get_backend_config()
        figures["backend"] = str(backend)
        assert ("nccl" in figures["backend"]) == checks.is_cuda, figures["backend"]
        row = torch.arange(7.0, device=checks.device)
        assert torch.equal(process_group_all_gather(row), row[None])
        number = torch.tensor([3], device=checks.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        received: list[Any] = [None]
        dist.all_gather_object(received, {"a": 1})
        assert (number.item(), received) == (3, [{"a": 1}])


def _config(checks: Checks, name: str, **settings: object) -> TrainConfig:
    batch = 16 if checks.tiny else 64
    sizes = {
        "data__train_samples": 2 * batch + 5, "data__test_samples": 20, "data__validation_fraction": 0, "epochs": 1,
        "global_batch_size": batch, "channels_last": "false", "optim__lr": 0.01, "logging__every_steps": 1,
        "schedule__name": "constant",
    }  # fmt: skip
    return from_command_line(runs.arguments(checks.scratch / name, checks.device, **(sizes | settings))).config


def _recipe(checks: Checks, name: str, **settings: object) -> None:
    with checks.check(f"the recipe, {name}") as figures:
        config = _config(checks, name, channels_last="true", threads=int(checks.tiny), **settings)
        figures["steps"] = train(config).step
        runs.assert_finished(config.run_dir)
        figures["losses"] = runs.losses(config.run_dir)
        assert len(figures["losses"]) == figures["steps"] == 3


def _engines(checks: Checks, precision: str) -> None:
    """Compare the losses of each engine with DDP's. `build_engine` would choose DDP for a single process."""
    with checks.check(f"engines, {precision}: equal losses") as figures:
        for name, shards in {"ddp": 0, "exact": 4, "fsdp": 0}.items():
            config = _config(checks, "engines", precision=precision, exact__shards=shards)
            data = build_data(config, Topology(), checks.device)
            engine = _engine(name, config, data, checks.device)
            figures[name] = _losses(engine, data, config)
        bound = 1e-9 if precision == "float64" else 2e-2
        for name in ("exact", "fsdp"):
            worst = max(abs(a / b - 1) for a, b in zip(figures[name], figures["ddp"], strict=True))
            assert worst < bound, f"{name}: relative difference {worst} from ddp"


def _engine(name: str, config: TrainConfig, data: DataPipeline, device: torch.device) -> Engine:
    model, layers, _ = build_network(config, Topology(), data)
    optim, compute = config.optim, Compute(config.precision, channels_last=False, device=device, timeout_seconds=20.0)
    match name:
        case "ddp":
            return DdpEngine(Ddp(), model, optim=optim, compute=compute, example=data.example(), compile=False)
        case "exact":
            shards = config.shards_on(device.type)
            return ExactEngine(Ddp(), model, optim=optim, compute=compute, shards=shards, workers=1, layers=layers)
        case _:
            return FsdpEngine(Fsdp(), model, optim=optim, compute=compute, layers=layers)


def _losses(engine: Engine, data: DataPipeline, config: TrainConfig) -> list[float]:
    """Return the loss of each step of an epoch."""
    totals, found = TotalsAccumulator(data.input_format.device), list[float]()
    for step, batches in enumerate(data.train_epoch(0)):
        train_step(engine, batches, loss=build_losses(config.loss).training, lr=0.01, step=step, totals=totals)
        found.append(totals.read().mean_loss)
    return found


def _wrapped_by_ddp(checks: Checks) -> None:
    """Check that torch's DDP with this project's hook, which `DdpEngine` uses on several ranks, leaves gradients unchanged."""
    config = _config(checks, "ddp", precision="float32", exact__shards=0)
    data = build_data(config, Topology(), checks.device)
    (batch,) = next(data.train_epoch(0))

    def gradients(*, low: torch.dtype | None, wrapped: bool) -> tuple[list[Tensor], int]:
        model = build_model(config.model, num_classes=data.num_classes, seed=config.seed).to(checks.device)
        convert_batch_norm(
            model, partial(SyncBatchNorm.of, all_gather_rows=one_shard_per_rank(process_group_all_gather))
        )
        sums = BucketSums(low)
        called: nn.Module = model
        if wrapped:
            ids = [checks.device] if checks.is_cuda else None
            ddp = DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=1, gradient_as_bucket_view=True)
            ddp.register_comm_hook(None, sums.hook)
            called = ddp
        for _ in range(2):  # DDP rebuilds its buckets after the first
            _mean_loss(called, batch).backward()  # type: ignore[no-untyped-call]
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(found) == len(list(model.parameters()))
        return found, sums.reduced_bytes

    with checks.check("DDP with the hook: the same gradients as without") as figures:
        plain, _ = gradients(low=None, wrapped=False)
        summed, figures["bytes_reduced"] = gradients(low=None, wrapped=True)
        assert figures["bytes_reduced"] == 2 * sum(p.nbytes for p in plain)
        assert all(torch.equal(a, b) for a, b in zip(plain, summed, strict=True))
    with checks.check("DDP with the hook, summed in bfloat16") as figures:
        rounded, figures["bytes_reduced"] = gradients(low=torch.bfloat16, wrapped=True)
        figures["relative_error"] = max(float((a - b).norm() / b.norm()) for a, b in zip(rounded, plain, strict=True))
        assert 0 < figures["relative_error"] < 1e-2


def _mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    with use_sample_keys(batch.sample_keys):
        return nn.functional.cross_entropy(model(batch.images), batch.labels)


def _collectives_in_a_graph(checks: Checks) -> None:
    """Capture and replay every kind of collective of exact mode, with eager ones on the same communicator between replays."""
    with checks.check("collectives in a CUDA graph") as figures:
        numbers = torch.zeros(1000, device=checks.device)
        gathered, exchanged = torch.zeros_like(numbers), torch.zeros_like(numbers)
        counts, most = (torch.zeros(3, dtype=torch.int64, device=checks.device) for _ in range(2))

        def body() -> None:
            all_gather(gathered, numbers * 2)
            dist.all_to_all_single(exchanged, gathered + 1)
            counts.copy_(numbers[:3])
            dist.all_reduce(counts)
            most.copy_(counts + 1)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)

        graph = captured(body)
        for value in range(1, 6):
            numbers.fill_(value)
            graph.replay()
            dist.all_reduce(numbers)
            found = [gathered, exchanged, counts, most, numbers]
            for tensor, expected in zip(found, (2 * value, 2 * value + 1, value, value + 1, value), strict=True):
                assert bool((tensor == expected).all()), f"replay {value}: {tensor[:3].tolist()}, not {expected}"
        figures["replays"] = 5
