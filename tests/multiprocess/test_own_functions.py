"""A loss, an augmentation and metrics of the user's at once: the same bits at any world size, resumed or not."""

import sys
from pathlib import Path
from typing import Any

import pytest
from kit.own_functions import write_functions
from kit.ranks import in_group, run_ranks
from kit.small_runs import Recorder, StopAfter, lines, small_config

from distributed.compare import compare
from distributed.recipe import train
from distributed.run.folder import RunFolder

SHARDS = 4
METRICS = ("brier", "confidence")


@in_group
def run(folder: Path, name: str, loss: str, engine: str = "ddp", stop_after: int | None = None) -> dict[str, Any]:
    """Train in exact mode; return the metrics of the last epoch on the test split."""
    sys.path.insert(0, str(folder))
    config = small_config(
        folder / name,
        loss={"name": f"own_functions:{loss}"},
        engine={"name": engine},
        exact={"shards": SHARDS},
        global_batch_size=12,
        evaluation={"metrics": [f"own_functions:{metric}" for metric in METRICS], "batch_size": 13},
        data={
            "train_samples": 40,
            "validation_fraction": 0.2,
            "augment": {"function": "own_functions:brightness", "mixup": 0.4},
        },
    )
    sink = Recorder()
    state = train(config, sinks=[sink], stop=StopAfter(stop_after) if stop_after else None)
    return {"epochs": state.epoch, "test": sink.epochs[-1].test.metrics if sink.epochs else None}


@pytest.mark.parametrize(("loss", "engine", "world_size"), [("focal", "ddp", 3), ("squared", "fsdp", 2)])
def test_the_bits_are_the_same_at_any_world_size(tmp_path: Path, loss: str, engine: str, world_size: int) -> None:
    write_functions(tmp_path)
    (alone,) = run_ranks(run, 1, tmp_path, "1", loss)
    assert alone["epochs"] == 2
    assert set(alone["test"]) == set(METRICS)
    for rank in run_ranks(run, world_size, tmp_path, str(world_size), loss, engine):
        assert rank == alone
    found = compare(RunFolder(tmp_path / "1"), RunFolder(tmp_path / str(world_size)))
    assert (found.divergences, found.logged, found.saves) == ([], 8, 2)
    (epoch, last) = lines(RunFolder(tmp_path / str(world_size)), "epoch")
    assert epoch["validation"].keys() == {"loss", "accuracy", "accuracy5", *METRICS}
    assert {name: last["test"][name] for name in METRICS} == alone["test"]


def test_a_stopped_run_resumes_with_the_same_bits(tmp_path: Path) -> None:
    write_functions(tmp_path)
    run_ranks(run, 1, tmp_path, "undisturbed", "focal")
    for rank in run_ranks(run, 2, tmp_path, "stopped", "focal", "ddp", 1):
        assert rank["epochs"] == 0
    for rank in run_ranks(run, 3, tmp_path, "stopped", "focal"):
        assert rank["epochs"] == 2
    found = compare(RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "stopped"))
    assert (found.divergences, found.saves) == ([], 2)
