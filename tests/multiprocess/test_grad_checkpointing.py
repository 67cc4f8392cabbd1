"""Gradient checkpointing on several ranks: the bits of a run without it, under every engine, with batch norm and dropout."""

from pathlib import Path
from typing import Any

import pytest
from kit.networks import CASES, NETWORKS, UNEVEN, run_epoch
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, small_config

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "stage 2": {"name": "deepspeed", "zero_stage": 2},
}
BLOCKS = {"resnet18": (), "vit_b_16": (), "mobilenet_v3_small": ("features",)}
RUNS = [("ddp", "resnet18"), ("ddp", "vit_b_16"), ("ddp", "mobilenet_v3_small"), ("fsdp", "resnet18"), ("fsdp", "vit_b_16"),
        ("stage 2", "vit_b_16")]  # fmt: skip


@in_group
def epoch(run_dir: Path, network: str, engine: dict[str, Any]) -> list[Any]:
    found = []
    for enabled in (False, True):
        modules = list(BLOCKS[network]) if enabled else []
        config = small_config(
            run_dir, model={"name": NETWORKS[network]}, engine=engine, exact=FAST, epochs=1,
            optim={"lr": 0.02, "max_grad_norm": 0.1}, grad_checkpointing={"enabled": enabled, "modules": modules},
            **CASES[UNEVEN],
        )  # fmt: skip
        found.append(run_epoch(config))
    return found


@pytest.mark.parametrize(("engine", "network"), RUNS)
def test_the_bits_do_not_depend_on_checkpointing(engine: str, network: str, tmp_path: Path) -> None:
    if engine.startswith("stage"):
        pytest.importorskip("deepspeed")
    for plain, checkpointed in run_ranks(epoch, 2, tmp_path / "run", network, ENGINES[engine], timeout_seconds=180):
        assert plain.norms == checkpointed.norms
        assert plain.train == checkpointed.train
        assert plain.test == checkpointed.test
        assert plain.tensors == checkpointed.tensors
