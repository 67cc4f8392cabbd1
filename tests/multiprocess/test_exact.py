"""Exact mode is bit-identical on any number of processes and threads, also when a run is stopped and resumed on others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kit.precision import LOW
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, small_config
from kit.traces import Trace, assert_same_run, tensors_of, traced

from distributed.comm import all_gather, collectives
from distributed.config import TrainConfig
from distributed.exact import bucket_reduce
from distributed.run.folder import RunFolder

CASES: dict[str, dict[str, Any]] = {
    "float32": {
        # 60 training images: two steps of 24 with three images per shard, and one of 12 with one or two per shard.
        "optim": {"lr": 0.05, "max_grad_norm": 0.8},
        "schedule": {"name": "one_cycle"},
        "data": {"train_samples": 80, "validation_fraction": 0.25},
    },
    "low precision, 3 micro-batches, plateau": {
        # One image per shard; in the last step of 12 images each micro-batch has four, so four shards are empty.
        "precision": LOW,
        "grad_accum_steps": 3,
        "optim": {"lr": 0.05, "max_grad_norm": 0.8},
        "schedule": {
            "name": "plateau",
            "metric": "loss",
            "factor": 0.5,
            "patience": 0,
            "min_delta": 50.0,
            "restore_best_on_drop": True,
        },
        "checkpoint": {"every_minutes": 0.0, "best_by": "loss"},
        "epochs": 4,
        "data": {"train_samples": 80, "validation_fraction": 0.25},
    },
    "float64, 3 micro-batches, few images": {
        # In the last step of two images, two micro-batches have one image each, and seven of eight shards are empty.
        "precision": "float64",
        "grad_accum_steps": 3,
        "optim": {"lr": 0.05},
        "data": {"train_samples": 26},
    },
    "float32, 3 micro-batches": {
        "grad_accum_steps": 3,
        "global_batch_size": 31,
        "optim": {"lr": 0.05},
        "data": {"train_samples": 71},
    },
    "low precision, contiguous, uneven shards": {
        "precision": LOW,
        "channels_last": False,
        "global_batch_size": 21,
        "optim": {"lr": 0.05, "weight_decay": 0.01, "decay_norm_and_bias": True},
        "model": {"dropout": 0.25},
        "evaluation": {"batch_size": 7},
        "data": {"train_samples": 46, "augment": {"cutout": 8}},
    },
    "low precision, AdamW, EMA, mixup": {
        "precision": LOW,
        "grad_accum_steps": 2,
        "optim": {"name": "adamw", "lr": 0.002, "ema_decay": 0.9},
        "loss": {"label_smoothing": 0.1},
        "evaluation": {"flip_tta": True},
        "data": {"train_samples": 50, "augment": {"mixup": 0.4, "cutmix": 1.0}},
    },
    "bfloat16, fast_alexnet, Muon": {
        "precision": "bfloat16",
        "model": {"name": "fast_alexnet", "widths": [4, 16, 12]},
        "optim": {"name": "muon", "lr": 0.2, "bias_lr_factor": 2.0},
        "schedule": {"name": "linear"},
        "evaluation": {"flip_tta": True, "shift_tta": 1},
        "data": {
            "train_samples": 50,
            "augment": {
                "crop": 2,
                "crop_padding": "reflect",
                "flip": "alternating",
                "low_res_epochs": 1,
                "low_res_side": 20,
            },
        },
    },
}
THREADS = {3: (1,), 1: (1, 2), 8: (1,), 2: (2,), 4: (1,)}
"""World size -> numbers of threads per rank. A stopped run resumes at the next world size in this order."""
REFERENCE = (1, 1)
FLOAT32, PLATEAU, FLOAT64, MICRO_BATCHES, CONTIGUOUS, EMA, MUON = CASES
ON_MANY = {4: (PLATEAU, CONTIGUOUS), 8: (FLOAT32,)}
"""World sizes too large for two cores run only some of the cases."""


BY_GROUP = (FLOAT32, PLATEAU)
STOPPED = (*BY_GROUP, MUON)
BOTH_MODES = {"fast, float32": CASES[FLOAT32], "fast, float64": CASES[FLOAT64]}


def cases_on(world_size: int) -> tuple[str, ...]:
    return ON_MANY.get(world_size, tuple(CASES))


OTHERS = [
    (world_size, threads, name)
    for world_size in sorted(THREADS)
    for threads in THREADS[world_size]
    for name in cases_on(world_size)
    if (world_size, threads) != REFERENCE
]


def config_of(name: str, run_dir: Path, *, threads: int, exact: dict[str, int] | None = None) -> TrainConfig:
    settings = (CASES | BOTH_MODES)[name]
    exact = exact or (FAST if name in BOTH_MODES else {"shards": 8})
    return small_config(run_dir, threads=threads, exact=exact, **settings)


@in_group
def run_all(folder: Path, stop_after: int | None) -> dict[str, Trace]:
    """Run every case to its end, and continue the runs that are stopped."""
    world_size, traces = collectives.world_size(), {}
    for threads in THREADS[world_size]:
        for name in cases_on(world_size):
            key = run_name(name, world_size, threads)
            traces[key] = traced(config_of(name, folder / key, threads=threads))
    for name in STOPPED:
        key = run_name(name, "stopped")
        traces[key] = traced(config_of(name, folder / key, threads=THREADS[world_size][0]), stop_after)
    if world_size in (1, 3):
        for name in BOTH_MODES:
            key = run_name(name, world_size)
            traces[key] = traced(config_of(name, folder / key, threads=1))
    if world_size == 3:
        for module in (bucket_reduce, all_gather):
            vars(module)["open_shared_memory"] = lambda size, device: None
        for name in BY_GROUP:
            key = run_name(name, "by group")
            traces[key] = traced(config_of(name, folder / key, threads=2))
    return traces


def run_name(name: str, *how: object) -> str:
    return ", ".join([name, *map(str, how)])


@dataclass(frozen=True)
class Everything:
    """All runs and their traces: by world size, by rank, by run. The run folders are in `folder`."""

    folder: Path
    ranks: dict[int, list[dict[str, Trace]]]

    def traces(self, name: str, world_size: int, *how: object) -> list[Trace]:
        return [rank[run_name(name, *how)] for rank in self.ranks[world_size]]

    def run(self, name: str, *how: object) -> RunFolder:
        return RunFolder(self.folder / run_name(name, *how))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """Start the processes of each world size once, which takes longer than most runs."""
    folder, ranks = tmp_path_factory.mktemp("exact"), {}
    last = list(THREADS)[-1]
    for world_size in THREADS:
        stop_after = None if world_size == last else 1  # takes effect one step later
        ranks[world_size] = run_ranks(run_all, world_size, folder, stop_after, timeout_seconds=200)
    return Everything(folder, ranks)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.mark.parametrize(("world_size", "threads", "name"), OTHERS)
def test_any_world_size_and_threads_are_bit_identical(
    everything: Everything, world_size: int, threads: int, name: str
) -> None:
    (alone,) = everything.traces(name, 1, *REFERENCE)
    for trace in everything.traces(name, world_size, world_size, threads):
        assert trace.steps == alone.steps
        assert trace.epochs == alone.epochs
        assert trace.decisions == alone.decisions
        assert (trace.final_epoch, trace.final_step, trace.stopped) == (
            alone.final_epoch,
            alone.final_step,
            alone.stopped,
        )
        assert trace.tensors == alone.tensors
        assert "fast" not in trace.transports
    assert_same_run(everything.run(name, world_size, threads), everything.run(name, *REFERENCE))


@pytest.mark.parametrize("name", STOPPED)
def test_resuming_at_other_world_sizes_is_bit_identical(everything: Everything, name: str) -> None:
    (alone,) = everything.traces(name, 1, *REFERENCE)
    attempts = [everything.traces(name, world_size, "stopped")[0] for world_size in THREADS]
    assert sum(attempt.stopped for attempt in attempts) >= 3, "number of stops"
    assert [step for attempt in attempts for step in attempt.steps] == alone.steps
    assert [epoch for attempt in attempts for epoch in attempt.epochs] == alone.epochs
    assert [decision for attempt in attempts for decision in attempt.decisions] == alone.decisions
    last = attempts[-1]
    assert (last.final_epoch, last.final_step, last.stopped) == (alone.final_epoch, alone.final_step, alone.stopped)
    for trace in everything.traces(name, list(THREADS)[-1], "stopped"):
        assert trace.tensors == alone.tensors
    assert_same_run(everything.run(name, "stopped"), everything.run(name, *REFERENCE))


@pytest.mark.parametrize("name", BY_GROUP)
def test_process_group_and_shared_memory_are_bit_identical(everything: Everything, name: str) -> None:
    for by_group, in_memory in zip(
        everything.traces(name, 3, "by group"), everything.traces(name, 3, 3, 1), strict=True
    ):
        assert by_group.transports == {"process_group_all_gather", "AllReduce"}
        assert in_memory.transports == {"SharedMemoryAllGather", "SharedMemoryReduce"}
        assert by_group.steps == in_memory.steps
        assert by_group.tensors == in_memory.tensors
    assert_same_run(everything.run(name, "by group"), everything.run(name, *REFERENCE))


def test_fast_mode_depends_on_the_world_size(everything: Everything) -> None:
    """Negative control: otherwise no test in this file could fail."""
    (alone,), others = (everything.traces("fast, float32", world_size, world_size) for world_size in (1, 3))
    assert alone.transports == {"fast"}
    for trace in others:
        assert [step["step"] for step in trace.steps] == [step["step"] for step in alone.steps]
        assert trace.steps != alone.steps
        assert trace.tensors != alone.tensors
        assert trace.tensors == others[0].tensors
    with pytest.raises(AssertionError):
        assert_same_run(everything.run("fast, float32", 3), everything.run("fast, float32", 1))


@pytest.mark.parametrize("world_size", [1, 3])
def test_fast_mode_in_float64_agrees_with_exact_mode(everything: Everything, world_size: int) -> None:
    fast = everything.traces("fast, float64", world_size, world_size)[0]
    (exact,) = everything.traces(FLOAT64, 1, *REFERENCE)
    assert len(fast.steps) == len(exact.steps) == 4
    for found, expected in zip(fast.steps, exact.steps, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-11)
        for name in ("step", "epoch", "lr", "accuracy"):
            assert found[name] == expected[name]
    tensors = tensors_of(everything.run(FLOAT64, *REFERENCE))
    for name, tensor in tensors_of(everything.run("fast, float64", world_size)).items():
        # The gradient of a bias before a batch norm is rounding error only.
        scale = max(1e-3, float(tensors[name].abs().max()))
        assert (tensor - tensors[name]).abs().max() <= 1e-12 * scale, name


def test_the_cases_exercise_their_features(everything: Everything) -> None:
    """Gradients were clipped, the plateau dropped the rate, and all steps differ."""
    alone = {name: everything.traces(name, 1, *REFERENCE)[0] for name in CASES}
    assert [len(trace.steps) for trace in alone.values()] == [6, 12, 4, 6, 6, 6, 6]
    for name, trace in alone.items():
        assert len({step["loss"] for step in trace.steps}) == len(trace.steps)
        max_grad_norm = CASES[name].get("optim", {}).get("max_grad_norm", 0)
        assert not max_grad_norm or sum(step["grad_norm"] > max_grad_norm for step in trace.steps) >= 3
        # The plateau's run ends by restoring its best epoch, where all momentum buffers are zero. In fast_alexnet, the
        # weights of batch norms are all ones.
        assert len(set(trace.tensors.values())) > (40 if name in (PLATEAU, MUON) else 60)
    plateau = alone[PLATEAU]
    assert sorted({step["lr"] for step in plateau.steps}) == [0.0125, 0.025, 0.05]
    assert sum("lr 0.0" in decision for decision in plateau.decisions) == 3
    assert [epoch["validation"] is None for epoch in plateau.epochs] == [False] * 4
    tensors = alone[EMA].tensors
    assert tensors["ema.fc1.weight"] != tensors["model.fc1.weight"]
    assert "optimizer.fc1.weight.exp_avg_sq" in tensors
