"""Exact mode on a GPU: bit-identical for one, two and four processes that share it, over gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config
from kit.traces import Trace, assert_same_run, traced

from distributed.comm import collectives
from distributed.run.folder import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASES: dict[str, dict[str, Any]] = {
    "float32": {"optim": {"lr": 0.05, "max_grad_norm": 0.8}, "schedule": {"name": "one_cycle"}},
    "bfloat16, 3 micro-batches": {"precision": "bfloat16", "grad_accum_steps": 3, "optim": {"lr": 0.05}},
    "float64, contiguous": {"precision": "float64", "channels_last": False, "optim": {"lr": 0.05}},
}
THREADS = {1: (1, 2), 2: (1,), 4: (2,)}
"""World size -> numbers of threads per rank."""
PLACES = [(world_size, threads) for world_size, numbers in THREADS.items() for threads in numbers]


@in_group  # uses gloo, since NCCL does not support two ranks on one GPU
def run_all(folder: Path) -> dict[tuple[str, int], Trace]:
    world_size, traces = collectives.world_size(), {}
    for threads in THREADS[world_size]:
        for name, settings in CASES.items():
            config = small_config(
                folder / f"{name}, {world_size}, {threads}",
                device="cuda",
                threads=threads,
                exact={"shards": 8},
                timeout_seconds=120.0,
                data={"train_samples": 80, "validation_fraction": 0.25},
                **settings,
            )
            traces[name, threads] = traced(config)
    return traces


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[dict[tuple[str, int], Trace]]]]:
    folder = tmp_path_factory.mktemp("gpu")
    return folder, {world_size: run_ranks(run_all, world_size, folder, timeout_seconds=180) for world_size in THREADS}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("world_size", "threads"), PLACES[1:])
def test_any_world_size_is_bit_identical_on_a_gpu(
    found: tuple[Path, dict[int, list[dict[tuple[str, int], Trace]]]], name: str, world_size: int, threads: int
) -> None:
    folder, ranks = found
    alone = ranks[1][0][name, 1]
    assert len(alone.steps) == 6
    for rank in ranks[world_size]:
        trace = rank[name, threads]
        local, over_group = {"LocalReduce", "NoneType"}, {"AllReduce", "process_group_all_gather"}
        assert trace.transports == (local if world_size == 1 else over_group)
        assert trace.steps == alone.steps
        assert trace.epochs == alone.epochs
        assert trace.tensors == alone.tensors
    assert_same_run(*(RunFolder(folder / f"{name}, {w}, {t}") for w, t in ((world_size, threads), (1, 1))))
