"""Ranks with different kernels: a warning, or an error if exact.shards is set explicitly."""

import os
from pathlib import Path

import pytest
import torch
from kit.ranks import in_group, run_ranks
from kit.small_runs import small_config

from distributed import recipe
from distributed.checkpoint.download import saved_content
from distributed.comm import collectives
from distributed.comm.process_group import check_own_gpu
from distributed.errors import InputError
from distributed.training import precision


@in_group
def outcome(run_dir: Path, shards: int | str) -> str:
    """Train while rank 1 has another environment. Return the error message, or rank 0's log if there is none."""
    if collectives.rank() == 1:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    try:
        recipe.train(small_config(run_dir, epochs=1, exact={"shards": shards}))
    except InputError as error:
        return str(error)
    return (run_dir / "logs" / "rank-0000.log").read_text() if collectives.rank() == 0 else ""


def test_explicit_exact_mode_refuses_unlike_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(outcome, 2, tmp_path / "run", 4, timeout_seconds=180)
    assert first == second
    assert "exact.shards = 4, but ranks differ in ONEDNN_MAX_CPU_ISA: not set on rank 0; AVX2 on rank 1" in first


def test_automatic_exact_mode_warns_of_unlike_ranks(tmp_path: Path) -> None:
    first, _ = run_ranks(outcome, 2, tmp_path / "run", "auto", timeout_seconds=180)
    assert "ranks differ in ONEDNN_MAX_CPU_ISA: not set on rank 0; AVX2 on rank 1" in first


@in_group
def resolved(cases: list[list[bool]]) -> list[str]:
    found, config = [], small_config(Path("run"), precision="auto")
    for has_bfloat16 in cases:
        precision.multiplies_bfloat16 = lambda has_bfloat16=has_bfloat16: has_bfloat16[collectives.rank()]
        found.append(precision.with_precision(config, torch.device("cpu"), saved_content).precision)
    return found


def test_all_ranks_resolve_auto_to_the_same_precision() -> None:
    ranks = run_ranks(resolved, 2, [[True, True], [True, False], [False, True]], timeout_seconds=180)
    assert ranks == [["bfloat16", "float32", "float32"]] * 2


@in_group
def refused() -> str:
    with pytest.raises(InputError) as caught:
        check_own_gpu(torch.device("cuda"), "engine.name = fsdp in fast mode")
    check_own_gpu(torch.device("cpu"), "engine.name = fsdp in fast mode")
    return str(caught.value)


def test_engines_that_need_nccl_refuse_a_shared_gpu() -> None:
    (message,) = set(run_ranks(refused, 2, timeout_seconds=180))
    assert message.startswith("engine.name = fsdp in fast mode needs one GPU per process")
