"""The references' results, and ours, read from run folders. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from distributed.config import from_command_line
from distributed.host.shipped import shipped
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import SplitRecord
from distributed.run.metrics_log import MetricsLog
from distributed.run.records import read_attempts

CONFIGS = shipped("configs/seeds")


@dataclass(frozen=True)
class Reference:
    """Accuracies, in per cent, that a reference implementation reports."""

    test: float
    validation: float | None = None


REFERENCES = {
    "I-10": Reference(79.46),
    "I-50": Reference(85.87),
    "A-10": Reference(68.80),
    "S1-10": Reference(78.7, 78.7),
    "S1-100": Reference(42.5, 41.3),
    "S2-10": Reference(75.4, 75.2),
    "S2-100": Reference(35.7, 35.4),
    "S3-10": Reference(79.6, 78.6),
}


@dataclass(frozen=True)
class Result:
    """Progress and results of a run, in per cent: at its best validation epoch, or at its last one without validation."""

    name: str
    model: str
    data: str
    epochs: int
    of_epochs: int
    ended_early: bool
    at_epoch: int
    train: float
    validation: float | None
    test: float | None
    test_loss: float | None
    minutes: float
    attempts: int
    processes: str
    device: str
    precision: str
    exact_shards: int
    versions: dict[str, str]
    date: str
    command: str

    @property
    def progress(self) -> int:
        """Finished epochs, or all planned ones after early stopping. Of runs with the same id, the highest counts."""
        return self.of_epochs if self.ended_early else self.epochs


def read_results(runs: Path) -> list[Result]:
    """Read the runs in a folder, except those that have not finished an epoch."""
    return [result for name in REFERENCES if (result := read_result(name, RunFolder(runs / name)))]


def read_result(name: str, run: RunFolder) -> Result | None:
    """Read a run; None if it has not finished an epoch."""
    config, log = run.saved_config(), MetricsLog.read(run.metrics_file)
    if config is None or not log.epochs:
        return None
    best = [epoch for epoch in log.epochs if epoch.is_best] if config.best_by else []
    chosen = (best or log.epochs)[-1]
    starts = [attempt for attempt in read_attempts(run.attempts_file) if attempt.event == "started"]
    finished = run.status().status == "finished"
    bits = starts[-1].bits or {}
    world_sizes = sorted({attempt.world_size or 1 for attempt in starts})
    return Result(
        name=name,
        model=config.model.name,
        data=config.data.name,
        epochs=len(log.epochs),
        of_epochs=from_command_line([str(CONFIGS / f"{name}.toml")]).config.epochs,
        ended_early=finished and len(log.epochs) < config.epochs,
        at_epoch=chosen.epoch + 1,
        train=100 * (chosen.train_accuracy or 0.0),
        validation=_accuracy(chosen.validation),
        test=_accuracy(chosen.test),
        test_loss=chosen.test.loss if chosen.test else None,
        minutes=log.minutes,
        attempts=len(starts),
        processes=" then ".join(map(str, world_sizes)),
        device=bits["device"],
        precision=config.precision,
        exact_shards=bits["shards"],
        versions=bits["versions"],
        date=(starts[-1].time or "")[:10],
        command=f"python -m distributed.experiments --only {name}",
    )


def _accuracy(measured: SplitRecord | None) -> float | None:
    return None if measured is None or measured.accuracy is None else 100 * measured.accuracy
