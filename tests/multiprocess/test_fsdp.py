"""Sharded weights (FSDP2): the curve of DDP, memory per rank, and resuming at any world size."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.precision import LOW
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, newest_checkpoint, small_config
from kit.traces import Trace, digest_of, digests_of, tensors_of, traced

from distributed.build import build_data, build_engine
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.models.keyed_dropout import use_sample_keys
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

CPU = torch.device("cpu")
FSDP, DDP = {"name": "fsdp"}, {"name": "ddp"}
CASES: dict[str, dict[str, Any]] = {
    # Seven steps per epoch; in the last step of two images some ranks and micro-batches are empty.
    "two micro-batches, clipping": {
        "epochs": 2,
        "global_batch_size": 11,
        "grad_accum_steps": 2,
        "optim": {"lr": 0.01, "max_grad_norm": 0.5},
        "data": {"train_samples": 85, "validation_fraction": 0.2},
        "evaluation": {"batch_size": 7},
    },
    "plateau, weights gathered once": {
        "engine": FSDP | {"reshard_after_forward": False},
        "epochs": 3,
        "data": {"train_samples": 60, "validation_fraction": 0.25},
        "schedule": {
            "name": "plateau",
            "metric": "loss",
            "patience": 0,
            "min_delta": 50.0,
            "restore_best_on_drop": True,
        },
        "checkpoint": {"every_minutes": 0.0, "best_by": "loss"},
    },
    "AdamW, EMA, cutmix": {
        "optim": {"name": "adamw", "lr": 1e-4, "ema_decay": 0.9},
        "loss": {"label_smoothing": 0.1},
        "data": {"train_samples": 100, "augment": {"cutmix": 1.0}},
    },
}
FIRST, PLATEAU, ADAMW = CASES


def config_of(name: str, run_dir: Path, engine: dict[str, str], precision: str = "float64") -> TrainConfig:
    settings = dict(CASES[name])
    sharded = settings.pop("engine", FSDP)
    chosen = sharded if engine == FSDP else engine
    return small_config(run_dir, precision=precision, engine=chosen, exact=FAST, **settings)


@in_group
def run_cases(folder: Path, engine: dict[str, str]) -> dict[str, Trace]:
    size = collectives.world_size()
    return {name: traced(config_of(name, folder / f"{name}, {engine['name']}, {size}", engine)) for name in CASES}


@dataclass(frozen=True)
class Runs:
    folder: Path
    alone: dict[str, Trace]
    sharded: dict[int, list[dict[str, Trace]]]

    def run(self, name: str, engine: str, world_size: int) -> RunFolder:
        return RunFolder(self.folder / f"{name}, {engine}, {world_size}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("fsdp")
    (alone,) = run_ranks(run_cases, 1, folder, DDP, timeout_seconds=150)
    sharded = {size: run_ranks(run_cases, size, folder, FSDP, timeout_seconds=150) for size in (2, 3)}
    return Runs(folder, alone, sharded)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_float64_metrics_match_ddp_on_one_process(runs: Runs, name: str, world_size: int) -> None:
    alone, ranks = runs.alone[name], [rank[name] for rank in runs.sharded[world_size]]
    assert all(rank.steps == ranks[0].steps and rank.epochs == ranks[0].epochs for rank in ranks)
    # The gradient of a bias before batch norm is rounding error only, which AdamW scales up to steps of size lr.
    tolerance = 1e-9 if name == ADAMW else 1e-12
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ranks[0].steps, alone.steps, strict=True))
    norms = max(
        abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"] for a, b in zip(ranks[0].steps, alone.steps, strict=True)
    )
    print(f"{name}, {world_size} ranks, {len(alone.steps)} steps: losses within {worst:.1e}, norms within {norms:.1e}")
    assert worst < tolerance
    assert norms < 10 * tolerance
    for found, expected in zip(ranks[0].epochs, alone.epochs, strict=True):
        for split in ("validation", "test"):
            if expected[split] is not None:
                assert found[split]["accuracy"] == expected[split]["accuracy"]
                assert found[split]["loss"] == pytest.approx(expected[split]["loss"], rel=100 * tolerance)
    assert ranks[0].decisions == alone.decisions
    assert ranks[0].tensors.keys() == alone.tensors.keys()


@pytest.mark.parametrize("world_size", [2, 3])
def test_saved_tensors_are_full_and_the_same_on_all_ranks(runs: Runs, world_size: int) -> None:
    for name in CASES:
        run = runs.run(name, "fsdp", world_size)
        shapes = {key: tensor.shape for key, tensor in tensors_of(runs.run(name, "ddp", 1)).items()}
        assert {key: tensor.shape for key, tensor in tensors_of(run).items()} == shapes
        saved = digests_of(run)[newest_checkpoint(run.path).name]
        for rank in runs.sharded[world_size]:
            assert {key: rank[name].tensors[key] for key in saved} == rank[name].tensors
            found = tensors_of(run)
            assert {key: digest_of(tensor) for key, tensor in found.items()} == rank[name].tensors


@in_group
def local_and_full_bytes(model: str) -> tuple[int, int]:
    """Return the bytes of this rank's parameters, momentum and gradients, and of those of all ranks together."""
    config = small_config(Path("unused"), model={"name": model}, engine=FSDP, exact=FAST, global_batch_size=6)
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    engine: Any = build_engine(config, topology, data, CPU)
    for parameter in engine.weights.optimizer.parameters:
        assert not parameter.requires_grad
    (batch,) = next(data.train_epoch(0))
    with use_sample_keys(batch.sample_keys):
        engine.micro_step(lambda m, b: (m(b.images).sum(), None), batch, last=True)
    gradients = [p.grad.to_local().nbytes for p in engine.model.parameters()]
    weights = [p.nbytes for p in engine.weights.optimizer.parameters]
    momentum = [t.nbytes for state in engine.weights.optimizer.state.values() for t in state.values()]
    full = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    return sum(weights) + sum(momentum) + sum(gradients), 3 * full


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_keeps_only_its_shards(world_size: int) -> None:
    for local, full in run_ranks(local_and_full_bytes, world_size, "improved_alexnet", timeout_seconds=120):
        assert local == pytest.approx(full / world_size, rel=0.02)


# Checkpoints


@in_group
def next_attempt(run_dir: Path, stop_after: int | None) -> Trace:
    return traced(config_of(FIRST, run_dir, FSDP), stop_after)


def test_resuming_at_another_world_size_keeps_the_curve(runs: Runs, tmp_path: Path) -> None:
    """Between engines: test_portable.py."""
    steps: list[dict[str, Any]] = []
    for world_size, stop_after in ((2, 1), (3, None)):
        first, *_ = run_ranks(next_attempt, world_size, tmp_path / "run", stop_after, timeout_seconds=120)
        steps += first.steps
    expected = runs.alone[FIRST].steps
    assert [step["step"] for step in steps] == [step["step"] for step in expected]
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, expected, strict=True))
    print(f"stopped on 2 ranks, resumed on 3: {len(steps)} losses within {worst:.1e}")
    assert worst < 1e-12


@in_group
def undisturbed_and_stopped(folder: Path) -> list[Trace]:
    traces = [traced(config_of(FIRST, folder / "undisturbed", FSDP, LOW))]
    for stop_after in (5, None):
        traces.append(traced(config_of(FIRST, folder / "stopped", FSDP, LOW), stop_after))
    return traces


def test_resuming_at_the_same_world_size_is_bit_identical(tmp_path: Path) -> None:
    for undisturbed, *attempts in run_ranks(undisturbed_and_stopped, 2, tmp_path, timeout_seconds=150):
        assert [attempt.stopped for attempt in attempts] == [True, False]
        assert [step for attempt in attempts for step in attempt.steps] == undisturbed.steps
        assert attempts[-1].tensors == undisturbed.tensors


@in_group
def losses_in_bfloat16() -> list[list[float]]:
    return [_losses_in_bfloat16(engine) for engine in (FSDP, DDP)]


def _losses_in_bfloat16(engine: dict[str, str]) -> list[float]:
    few = {"global_batch_size": 8, "data": {"train_samples": 24}}
    config = small_config(Path("unused"), precision="bfloat16", engine=engine, exact=FAST, optim={"lr": 0.001}, **few)
    topology = Topology(collectives.rank(), collectives.world_size())
    data = build_data(config, topology, CPU)
    built, sums, found = build_engine(config, topology, data, CPU), TotalsAccumulator(CPU), []
    for step, micro_batches in enumerate(data.train_epoch(0)):
        train_step(built, micro_batches, loss=build_losses(config.loss).training, lr=0.001, step=step, totals=sums)
        found.append(sums.read().mean_loss)
    assert {tensor.dtype for name, tensor in built.state() if "num_batches" not in name} == {torch.float32}
    return found


def test_bfloat16_curve_matches_autocast() -> None:
    """The first loss is bit-identical: the same casts, only earlier."""
    (sharded, replicated), _ = run_ranks(losses_in_bfloat16, 2, timeout_seconds=180)
    assert sharded[0] == replicated[0]
    assert sharded == pytest.approx(replicated, rel=2e-3)
