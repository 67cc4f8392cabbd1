"""Small training runs for tests: a config that trains in seconds, a recording sink, a stop source."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distributed.config import TrainConfig
from distributed.metrics.records import EpochMetrics, TrainMetrics
from distributed.run.checkpoint_layout import checkpoints
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import MACHINE_METRICS

FAST = {"shards": 0}
"""The `exact` section for fast mode. The default, auto, uses eight shards."""


def small_config(run_dir: Path, **settings: Any) -> TrainConfig:
    """improved_alexnet on a few generated images; logs every step.

    Dicts for data, optim and checkpoint are merged into their sections; other sections are replaced.
    """
    data = {
        "name": "generated10",
        "train_samples": 200,
        "test_samples": 20,
        "validation_fraction": 0.0,
        **settings.pop("data", {}),
    }
    values = {
        "run_dir": run_dir,
        "epochs": 2,
        "global_batch_size": 24,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        "timeout_seconds": 30.0,
        "optim": {"name": "sgd", "lr": 0.01, **settings.pop("optim", {})},
        "schedule": {"name": "constant"},
        "checkpoint": {"every_minutes": 0.0, "max_overhead": 1.0, **settings.pop("checkpoint", {})},
        "logging": {"every_steps": 1, "tensorboard": False, "curves": False, "level": "WARNING"},
        "data": data,
    }
    return TrainConfig.model_validate(values | settings)


@dataclass
class Recorder:
    """A sink that records all metrics, on every rank."""

    on_every_rank: ClassVar[bool] = True
    steps: list[TrainMetrics] = field(default_factory=list)
    epochs: list[EpochMetrics] = field(default_factory=list)

    def log_step(self, metrics: TrainMetrics) -> None:
        self.steps.append(metrics)

    def log_epoch(self, metrics: EpochMetrics) -> None:
        self.epochs.append(metrics)

    def close(self) -> None:
        pass


@dataclass
class StopAfter:
    """A stop source that requests a stop after this many steps of an attempt. The ranks stop one step later."""

    steps: int
    calls: int = 0

    def requested(self) -> str | None:
        self.calls += 1
        return "the test" if self.calls >= self.steps else None


def without_clock(metrics: TrainMetrics | EpochMetrics | dict[str, Any]) -> dict[str, Any]:
    values = metrics if isinstance(metrics, dict) else asdict(metrics)
    return {key: value for key, value in values.items() if key not in MACHINE_METRICS}


def lines(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    """The run's metrics of one kind, without those that depend on the machine."""
    found = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [without_clock(line) for line in found if line["kind"] == kind]


def state_of(run: RunFolder) -> dict[str, Any]:
    """The training state in the newest checkpoint: counters, schedule and totals."""
    content: dict[str, Any] = json.loads((newest_checkpoint(run.path) / "state.json").read_text())["state"]
    return content


def newest_checkpoint(run_dir: Path) -> Path:
    return checkpoints(RunFolder(run_dir).checkpoints)[-1]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
