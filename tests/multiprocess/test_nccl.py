"""Several GPUs over NCCL, one per rank: fast and exact mode on one and two, FSDP2, and a rank that starts late."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit.engines import difference
from kit.ranks import in_group_on_gpus, run_ranks
from kit.small_runs import FAST, small_config
from kit.traces import Trace, assert_same_run, tensors_of, traced

from distributed.run.folder import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DEVICE, BACKEND = "cuda", "nccl"
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"engine": {"name": "ddp"}, "exact": FAST},
    "fsdp": {"engine": {"name": "fsdp"}, "exact": FAST},
    "exact": {"engine": {"name": "ddp"}, "exact": {"shards": 8}},
}
Found = tuple[Path, dict[str, list[dict[str, Trace]]]]


@in_group_on_gpus
def run_all(folder: Path, names: list[str]) -> dict[str, Trace]:
    assert BACKEND in dist.get_backend_config()
    settings: dict[str, Any] = {
        "device": DEVICE, "precision": "float64", "channels_last": False, "timeout_seconds": 60.0,
        "optim": {"lr": 0.05, "max_grad_norm": 0.8}, "data": {"train_samples": 80, "validation_fraction": 0.25},
    }  # fmt: skip
    return {name: traced(small_config(folder / name, **settings, **RUNS[name])) for name in names}


def run_late(folder: Path) -> dict[str, Trace]:
    """Start rank 0, for which the others wait, last."""
    if os.environ["RANK"] == "0":
        time.sleep(3)
    return run_all(folder, ["ddp"])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("nccl")
    return folder, {
        "one": run_ranks(run_all, 1, folder / "one", ["ddp", "exact"], timeout_seconds=120),
        "two": run_ranks(run_all, 2, folder / "two", ["ddp", "fsdp", "exact"], timeout_seconds=120),
        "late": run_ranks(run_late, 2, folder / "late", timeout_seconds=120),
    }


def assert_close(folder: Path, found: Trace, run: str, expected: Trace, reference: str) -> None:
    assert len(expected.steps) == 6
    losses, there = ([step["loss"] for step in trace.steps] for trace in (found, expected))
    assert losses == pytest.approx(there, rel=1e-9)
    weights, expected_weights = (tensors_of(RunFolder(folder / name)) for name in (run, reference))
    assert difference(weights, expected_weights, "model") < 1e-9


def test_fast_mode_agrees_on_one_and_two_gpus(found: Found) -> None:
    folder, traces = found
    for rank in traces["two"]:
        assert_close(folder, rank["ddp"], "two/ddp", traces["one"][0]["ddp"], "one/ddp")


def test_fsdp_matches_ddp(found: Found) -> None:
    folder, traces = found
    for rank in traces["two"]:
        assert_close(folder, rank["fsdp"], "two/fsdp", rank["ddp"], "two/ddp")


def test_exact_mode_is_bit_identical_on_one_and_two_gpus(found: Found) -> None:
    folder, traces = found
    for rank in traces["two"]:
        assert rank["exact"].steps == traces["one"][0]["exact"].steps
        assert rank["exact"].tensors == traces["one"][0]["exact"].tensors
    assert_same_run(RunFolder(folder / "two/exact"), RunFolder(folder / "one/exact"))


def test_start_order_of_ranks_changes_no_bit(found: Found) -> None:
    _, traces = found
    for late, rank in zip(traces["late"], traces["two"], strict=True):
        assert late["ddp"].steps == rank["ddp"].steps
        assert late["ddp"].tensors == rank["ddp"].tensors
