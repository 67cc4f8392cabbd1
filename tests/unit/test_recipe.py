import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger

from distributed.checkpoint import checkpoints
from distributed.config import TrainConfig, load
from distributed.metrics import EpochMetrics, TrainMetrics
from distributed.recipe import train
from distributed.run_folder import RunFolder
from distributed.state import TrainState

STEPS_PER_EPOCH = 2


class AfterStep:
    """Asks to stop so that the run does after `step` more steps: the ranks agree one step late."""

    def __init__(self, step: int) -> None:
        self.left = step - 1

    def requested(self) -> str | None:
        self.left -= 1
        return "a test" if self.left <= 0 else None


class Told:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[int] = []

    def train(self, metrics: TrainMetrics) -> None:
        self.steps.append(metrics.step)

    def epoch(self, metrics: EpochMetrics) -> None:
        self.epochs.append(metrics.epoch)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _one_thread_and_the_log_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    logger.remove()
    yield
    logger.remove()
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    words = (
        "--data.name generated10 --data.train_samples 40 --data.test_samples 10 --global_batch_size 16 --epochs 4 "
        "--precision float32 --threads 1 --device cpu --logging.tensorboard false --logging.every_steps 1 "
        "--schedule.name constant --model.dropout 0.5"
    )
    return load([*words.split(), "--run_dir", str(tmp_path / "run")])[0]


def newest(config: TrainConfig) -> dict:
    return json.loads((checkpoints(RunFolder(config.run_dir).checkpoints)[-1] / "state.json").read_text())["state"]


def lines(config: TrainConfig, kind: str) -> list[int]:
    told = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in told if line["kind"] == kind]


def stopped(config: TrainConfig, after: int, told: Told | None = None) -> TrainState:
    return train(config, stop=AfterStep(after), sinks=[told] if told else [])


@pytest.mark.parametrize("first", [2, 3, 4, 5])
def test_a_run_stopped_after_any_step_goes_on(config, first):
    told = Told()
    state = stopped(config, first, told)
    assert (state.step, state.stop_reason) == (first, "a test")
    assert RunFolder(config.run_dir).status()["status"] == "stopped"
    state = stopped(config, 7 - first, told)
    assert state.step == 7
    assert told.steps == lines(config, "train") == [1, 2, 3, 4, 5, 6, 7]
    assert told.epochs == [0, 1, 2]
    assert lines(config, "epoch") == [2, 4, 6]


def test_a_save_at_the_last_step_of_an_epoch_does_not_keep_the_epochs_end_from_being_saved(config):
    every_second = config.checkpoint.model_copy(update={"every_steps": STEPS_PER_EPOCH})
    config = config.model_copy(update={"epochs": 1, "checkpoint": every_second})
    train(config)
    state = newest(config)
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (2, 1, 0)
    assert state["best"] is not None
    assert (RunFolder(config.run_dir).checkpoints / "best").exists()


def test_logging_to_files_needs_no_terminal_log_first(config, capsys):
    stopped(config, 2)
    assert "Logging error" not in capsys.readouterr().err
    log = (RunFolder(config.run_dir).logs / "rank-0000.log").read_text()
    assert "global batch 16" in log
