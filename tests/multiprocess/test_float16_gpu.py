"""float16 with loss scaling on a GPU, for one process and for two that share it over gloo: skipping, resuming, compiling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, small_config
from kit.traces import Trace, traced

from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.optim import loss_scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OVERFLOWING_SCALE = 2.0**24


def config_of(run_dir: Path, precision: str, **settings: Any) -> TrainConfig:
    return small_config(
        run_dir, device="cuda", precision=precision, timeout_seconds=120.0, grad_accum_steps=2,
        optim={"lr": 0.01, "max_grad_norm": 1.0, "ema_decay": 0.9}, data={"train_samples": 240}, **settings,
    )  # fmt: skip


@in_group  # uses gloo, since NCCL does not support two ranks on one GPU
def run_all(folder: Path) -> dict[str, Trace]:
    loss_scale.INITIAL_SCALE = OVERFLOWING_SCALE
    size = collectives.world_size()
    fast, exact = {"exact": FAST}, {"exact": {"shards": 4}}
    traces = {
        "float32": traced(config_of(folder / f"float32 {size}", "float32", **fast)),
        "float16": traced(config_of(folder / f"float16 {size}", "float16", **fast)),
        "exact": traced(config_of(folder / f"exact {size}", "float16", **exact)),
        "stopped": traced(config_of(folder / f"stopped {size}", "float16", **fast), 2),
    }
    traces["resumed"] = traced(config_of(folder / f"stopped {size}", "float16", **fast))
    if size == 1:
        traces["compiled"] = traced(config_of(folder / "compiled", "float16", compile=True, **fast))
    return traces


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Trace]]]:
    folder = tmp_path_factory.mktemp("gpu")
    return {size: run_ranks(run_all, size, folder, timeout_seconds=250) for size in (1, 2)}


def skipped(trace: Trace) -> list[int]:
    return [step["skipped_steps"] for step in trace.steps]


@pytest.mark.parametrize("size", [1, 2])
def test_overflows_are_skipped_and_the_curve_matches_float32(
    found: dict[int, list[dict[str, Trace]]], size: int
) -> None:
    for rank in found[size]:
        low, wide = rank["float16"], rank["float32"]
        first_good = skipped(low).index(0)
        print(f"{size} ranks: {first_good} of {len(low.steps)} steps skipped")
        assert 1 <= first_good <= 10
        assert sum(skipped(low)) == first_good
        assert low.steps[0]["loss"] == pytest.approx(wide.steps[0]["loss"], rel=1e-3)
        assert low.steps[-1]["loss"] == pytest.approx(wide.steps[-1]["loss"], rel=0.2)
        assert low.steps == found[size][0]["float16"].steps


@pytest.mark.parametrize("size", [1, 2])
def test_resuming_is_bit_identical(found: dict[int, list[dict[str, Trace]]], size: int) -> None:
    for rank in found[size]:
        assert [*rank["stopped"].steps, *rank["resumed"].steps] == rank["float16"].steps
        assert rank["resumed"].tensors == rank["float16"].tensors


def test_exact_mode_is_bit_identical_on_one_and_two_ranks(found: dict[int, list[dict[str, Trace]]]) -> None:
    for rank in found[2]:
        assert rank["exact"].steps == found[1][0]["exact"].steps
        assert rank["exact"].tensors == found[1][0]["exact"].tensors


def test_a_compiled_network_skips_about_the_same_steps(found: dict[int, list[dict[str, Trace]]]) -> None:
    compiled, plain = found[1][0]["compiled"], found[1][0]["float16"]
    assert abs(sum(skipped(compiled)) - sum(skipped(plain))) <= 1
    assert compiled.steps[0]["loss"] == pytest.approx(plain.steps[0]["loss"], rel=1e-3)
