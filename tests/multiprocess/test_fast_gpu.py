"""Fast mode in bfloat16 on one GPU: a run that stops and resumes, and its checkpoint on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kit.engines import CPU, built
from kit.ranks import in_group, run_ranks
from kit.small_runs import FAST, newest_checkpoint, small_config
from kit.traces import Trace, assert_same_run, tensors_of, traced

from distributed.checkpoint.tensor_file import read_tensors
from distributed.config import TrainConfig
from distributed.run.folder import RunFolder
from distributed.training.losses import CROSS_ENTROPY
from distributed.training.steps import evaluate
from distributed.training.views import Views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


def config_of(run_dir: Path, device: str) -> TrainConfig:
    settings: dict[str, Any] = {"optim": {"lr": 0.05, "ema_decay": 0.9}, "data": {"validation_fraction": 0.25}}
    return small_config(run_dir, device=device, precision="bfloat16", exact=FAST, timeout_seconds=120.0, **settings)


@in_group
def run_all(folder: Path) -> dict[str, Trace]:
    stopped = config_of(folder / "stopped", DEVICE)
    return {
        "uninterrupted": traced(config_of(folder / "uninterrupted", DEVICE)),
        "stopped": traced(stopped, 2),
        "resumed": traced(stopped),
    }


@in_group
def on_the_cpu(run_dir: Path) -> tuple[float, list[str]]:
    """Return the test loss, and the names of tensors that differ from the checkpoint's file."""
    engine, data = built(config_of(run_dir, "cpu"))
    engine.load_state(read_tensors(newest_checkpoint(run_dir)))
    expected = tensors_of(RunFolder(run_dir))
    different = [name for name, tensor in engine.state() if not torch.equal(tensor, expected[name])]
    return evaluate(engine, data, "test", loss=CROSS_ENTROPY, views=Views(), device=CPU).mean_loss, different


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trace]]:
    folder = tmp_path_factory.mktemp("gpu")
    (traces,) = run_ranks(run_all, 1, folder, timeout_seconds=150)
    return folder, traces


def test_a_stopped_run_ends_with_the_same_bits(found: tuple[Path, dict[str, Trace]]) -> None:
    folder, traces = found
    assert 0 < len(traces["stopped"].steps) < len(traces["uninterrupted"].steps)
    assert [*traces["stopped"].steps, *traces["resumed"].steps] == traces["uninterrupted"].steps
    assert traces["resumed"].tensors == traces["uninterrupted"].tensors
    assert_same_run(RunFolder(folder / "stopped"), RunFolder(folder / "uninterrupted"))


def test_a_checkpoint_from_cuda_is_evaluated_on_the_cpu(found: tuple[Path, dict[str, Trace]]) -> None:
    folder, traces = found
    ((loss, different),) = run_ranks(on_the_cpu, 1, folder / "uninterrupted", timeout_seconds=60)
    assert different == []
    assert loss == pytest.approx(traces["uninterrupted"].epochs[-1]["test"]["loss"], rel=2e-2)
