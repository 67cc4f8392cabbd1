"""DeepSpeed: memory per rank, complete runs that match DDP, resuming, evaluation on uneven shards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.engines import built, config_with, copied, steps
from kit.precision import LOW
from kit.ranks import in_group, run_ranks
from kit.small_runs import newest_checkpoint, state_of
from kit.traces import Trace, digest_of, tensors_of, traced

from distributed.checkpoint.tensor_file import read_tensors
from distributed.models.keyed_dropout import use_sample_keys
from distributed.run.folder import RunFolder

STAGES = ["zero 1", "zero 2", "zero 3"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


# Memory per rank


@in_group
def local_bytes() -> dict[str, dict[str, int]]:
    """Return, by stage, this rank's bytes of optimizer, gradients and weights after a backward pass, and those of all ranks."""
    found = {}
    for name in STAGES:
        engine: Any
        engine, data = built(config_with(name, global_batch_size=6))
        (batch,) = next(data.train_epoch(0))
        with use_sample_keys(batch.sample_keys):
            engine.micro_step(lambda m, b: (m(b.images).sum(), None), batch, last=True)
        zero = engine._deepspeed.optimizer
        gradients = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
        engine.step(0.01, step=0)  # frees all gathered layers
        parameters = list(engine.model.parameters())
        optimizer = [tensor for key, tensor in engine.local_tensors().items() if key.startswith("optimizer.")]
        found[name] = {
            "optimizer": sum(tensor.local.nbytes for tensor in optimizer),
            "gradients": sum(gradient.nbytes for gradient in gradients),
            "weights": sum(p.nbytes + getattr(p, "ds_tensor", p[:0]).nbytes for p in parameters),
            "full": sum(tensor.placement.shape.numel() * 4 for tensor in optimizer),
        }
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_keeps_only_the_shards_of_its_stage(world_size: int) -> None:
    for rank in run_ranks(local_bytes, world_size, timeout_seconds=150):
        for name, found in rank.items():
            shard = pytest.approx(found["full"] / world_size, rel=0.35)  # DeepSpeed's shards differ in size
            assert found["optimizer"] == shard, name
            assert found["weights"] == (shard if name == "zero 3" else found["full"]), name
            if name != "zero 1":
                assert found["gradients"] == shard, name


# Runs

PLATEAU: dict[str, Any] = {
    "epochs": 3,
    "global_batch_size": 11,
    "grad_accum_steps": 2,
    "optim": {"lr": 0.01, "max_grad_norm": 0.5, "ema_decay": 0.9},
    "data": {"train_samples": 60, "validation_fraction": 0.25},
    "evaluation": {"batch_size": 7},
    "schedule": {"name": "plateau", "metric": "loss", "patience": 0, "min_delta": 50.0, "restore_best_on_drop": True},
    "checkpoint": {"every_minutes": 0.0, "best_by": "loss"},
}


@in_group
def complete_runs(folder: Path, names: list[str]) -> list[Trace]:
    return [traced(config_with(name, folder / name, **PLATEAU)) for name in names]


def test_a_complete_run_matches_ddp(tmp_path: Path) -> None:
    """With plateau and restored best epoch, EMA, accumulation, clipping, and evaluation with empty ranks."""
    ranks = run_ranks(complete_runs, 3, tmp_path, ["ddp", *STAGES], timeout_seconds=240)
    for ddp, *others in ranks:
        for name, found in zip(STAGES, others, strict=True):
            for step, expected in zip(found.steps, ddp.steps, strict=True):
                assert step["loss"] == pytest.approx(expected["loss"], rel=1e-4), (name, step)
            for epoch, expected in zip(found.epochs, ddp.epochs, strict=True):
                for split in ("validation", "test"):
                    assert epoch[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-4), (name, epoch)
            assert found.decisions == ddp.decisions
            assert found.decisions, "the plateau made no decision, so it was not tested"
            assert found.tensors.keys() == ddp.tensors.keys()
    assert all([trace.steps for trace in rank] == [trace.steps for trace in ranks[0]] for rank in ranks)
    assert all([trace.tensors for trace in rank] == [trace.tensors for trace in ranks[0]] for rank in ranks)


@in_group
def undisturbed_and_stopped(folder: Path) -> dict[str, list[Trace]]:
    settings: dict[str, Any] = {**PLATEAU, "precision": LOW}
    return {
        name: [
            traced(config_with(name, folder / f"{name}, undisturbed", **settings)),
            *(traced(config_with(name, folder / name, **settings), stop_after) for stop_after in (3, None)),
        ]
        for name in STAGES
    }


def test_resuming_at_the_same_world_size_is_bit_identical(tmp_path: Path) -> None:
    for rank in run_ranks(undisturbed_and_stopped, 2, tmp_path, timeout_seconds=240):
        for name, (undisturbed, *attempts) in rank.items():
            assert [attempt.stopped for attempt in attempts] == [True, False]
            assert [step for attempt in attempts for step in attempt.steps] == undisturbed.steps, name
            assert attempts[-1].tensors == undisturbed.tensors, name


ATTEMPTS = [("zero 3", 3), ("ddp", 2), ("zero 1", 4), ("fsdp", 3), ("zero 2", 2), ("ddp", 1)]
"""One run is resumed under each of these for two steps."""


@in_group
def next_attempt(run_dir: Path, name: str, stop_after: int | None) -> tuple[Trace, dict[str, str]]:
    """Take the next steps of a run; also return digests of an engine into which its newest checkpoint was loaded."""
    config, loaded = config_with(name, run_dir, **PLATEAU), dict[str, str]()
    if RunFolder(run_dir).newest_state():
        fresh, _ = built(config)
        fresh.load_state(read_tensors(newest_checkpoint(run_dir)))
        loaded = {key: digest_of(tensor) for key, tensor in fresh.state()}
        torch.set_num_threads(1)
    return traced(config, stop_after), loaded


def test_resuming_under_any_engine_at_any_world_size(tmp_path: Path) -> None:
    run, undisturbed = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "ddp")
    (expected,) = run_ranks(complete_runs, 1, tmp_path, ["ddp"], timeout_seconds=100)[0]
    losses: list[float] = []
    decisions: list[str] = []
    for name, world_size in ATTEMPTS:
        last = (name, world_size) == ATTEMPTS[-1]
        before = {key: digest_of(tensor) for key, tensor in tensors_of(run).items()} if losses else {}
        ranks = run_ranks(next_attempt, world_size, run.path, name, None if last else 1, timeout_seconds=120)
        for _, loaded in ranks:
            assert loaded == before, f"{name}: a loaded tensor differs from the saved one"
        losses += [step["loss"] for step in ranks[0][0].steps]
        decisions += ranks[0][0].decisions
    assert losses == pytest.approx([step["loss"] for step in expected.steps], rel=1e-4)
    assert decisions == expected.decisions
    found, reference = state_of(run), state_of(undisturbed)
    for key in ("epoch", "step", "samples_seen"):
        assert found[key] == reference[key]
    assert found["schedule"].keys() == reference["schedule"].keys()
    assert found["best"]["epoch"] == reference["best"]["epoch"]


def losses_in_bfloat16(name: str) -> list[float]:
    config = config_with(name, precision="bfloat16", global_batch_size=8)
    engine, data = built(config)
    losses, _ = steps(engine, data, config, lr=0.001, count=3)
    assert {tensor.dtype for key, tensor in engine.state() if "num_batches" not in key} == {torch.float32}
    return losses


@in_group
def curves_in_bfloat16() -> dict[str, list[float]]:
    return {name: losses_in_bfloat16(name) for name in ("ddp", *STAGES)}


def test_bfloat16_curve_matches_autocast() -> None:
    """The first loss is bit-identical, since the casts are the same; the state is float32."""
    for rank in run_ranks(curves_in_bfloat16, 2, timeout_seconds=120):
        for name in STAGES:
            assert rank[name][0] == rank["ddp"][0], name
            assert rank[name] == pytest.approx(rank["ddp"], rel=2e-3), name


# Weights that are not trained


@in_group
def states(settings: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Return, by engine, the state that a checkpoint would have before the first step."""
    return {name: copied(built(config_with(name, **settings))[0]) for name in ("ddp", *STAGES)}


@pytest.mark.parametrize(
    "settings",
    [{"model": {"name": "fast_alexnet", "widths": [8, 8, 8]}}, {"model": {"name": "kit.tied_network:Tied"}}],
    ids=["frozen", "tied"],
)
def test_frozen_and_tied_weights_are_saved_at_every_stage(settings: dict[str, Any]) -> None:
    for rank in run_ranks(states, 2, settings, timeout_seconds=150):
        expected = {name: tensor for name, tensor in rank["ddp"].items() if name.startswith("model.")}
        for stage in STAGES:
            found = {name: tensor for name, tensor in rank[stage].items() if name.startswith("model.")}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stage
