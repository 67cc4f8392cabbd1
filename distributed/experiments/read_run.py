"""Reads the result of a run from its folder. Imports no torch."""

import shlex
from collections.abc import Sequence
from typing import Any

from loguru import logger

from distributed.config import TrainConfig, changes_experiment, differences, toml_value
from distributed.experiments.catalogue import Experiment
from distributed.experiments.plan import planned_config, setting_path
from distributed.experiments.result import CurvePoint, Device, Machine, Result
from distributed.host.cpu_quota import available_cpus
from distributed.host.identity import host
from distributed.run.folder import RunFolder
from distributed.run.metrics_file import EpochRecord, SplitRecord
from distributed.run.metrics_log import MetricsLog
from distributed.run.records import AttemptRecord, read_attempts

_NEEDED = {"device", "shards", "versions"}


def read_result(experiment: Experiment, run: RunFolder) -> Result | None:
    """Read a run; None if it has not finished an epoch, or if what it ran on is not one kind of device."""
    config, log = run.saved_config(), MetricsLog.read(run.metrics_file)
    if config is None or not log.epochs:
        return None
    best = [epoch for epoch in log.epochs if epoch.is_best] if config.best_by else []
    shown = (best or log.epochs)[-1]
    starts = [attempt for attempt in read_attempts(run.attempts_file) if attempt.event == "started"]
    known = [start.bits for start in starts if start.bits and start.bits.keys() >= _NEEDED]
    kinds = {_kind(bits) for bits in known}
    if len(kinds) != 1:
        problem = "was trained on a CPU and on a GPU" if kinds else "does not say what it was trained on"
        logger.warning("{}: {}, so its result is left out", run.path, problem)
        return None
    bits = known[-1]
    planned = planned_config(experiment)
    settings = _settings(experiment, planned, config)
    processes = _then([attempt.world_size or 1 for attempt in starts])
    return Result(
        id=experiment.id,
        kind=experiment.kind,
        config=experiment.config,
        settings=settings,
        seed=config.seed,
        model=config.model.name,
        data=config.data.name,
        validation=_accuracy(shown.validation),
        test=_accuracy(shown.test),
        test_loss=_rounded(shown.test.loss) if shown.test else None,
        train=_per_cent(shown.train_accuracy),
        minutes=round(log.minutes, 3),
        epochs=len(log.epochs),
        of_epochs=planned.epochs,
        ended_early=run.status().status == "finished" and len(log.epochs) < config.epochs,
        at_epoch=shown.epoch + 1,
        attempts=len(starts),
        processes=processes,
        machine=_machine(starts, known),
        precision=config.precision,
        exact_shards=bits["shards"],
        versions=bits["versions"],
        date=(starts[-1].time or "")[:10],
        revision=_then([attempt.git for attempt in starts if attempt.git]) or None,
        command=_command(experiment, config, settings, processes),
        curve=tuple(_curve(log.epochs)),
    )


def _settings(experiment: Experiment, planned: TrainConfig, ran: TrainConfig) -> tuple[str, ...]:
    """Return the catalogue's overrides, and those that the run has beside or instead of them."""
    tree = ran.model_dump(mode="json")
    texts = {setting_path(text): text for text in experiment.settings}
    for path, _, value in differences(planned, ran):
        if path != "seed" and changes_experiment(path, ran) and _has(tree, path):
            texts[path] = f"--{path}={_text(value)}"
    if planned.exact.shards == "auto" != ran.exact.shards:  # no difference, since the run might have resolved it
        texts["exact.shards"] = f"--exact.shards={ran.exact.shards}"
    return tuple(sorted(texts.values()))


def _has(tree: dict[str, Any], path: str) -> bool:
    """Return whether a config has this setting; a variant of a section lacks those of the others."""
    first, _, rest = path.partition(".")
    return first in tree and (not rest or (isinstance(tree[first], dict) and _has(tree[first], rest)))


def _text(value: object) -> str:
    return value if isinstance(value, str) else toml_value(value).strip('"')


def _command(experiment: Experiment, config: TrainConfig, settings: Sequence[str], processes: str) -> str:
    """Return the command that repeats a run. Folders of the machine are not in it."""
    words = ["python", "-m", "distributed.experiments", "--only", experiment.id, "--seeds", str(config.seed)]
    if processes.isdecimal() and processes != "1":
        words += ["--nproc_per_node", processes]
    is_given = any(text.startswith("--precision=") for text in settings)
    if config.precision != "auto" and not is_given:  # what auto means depends on the machine
        words += ["--precision", config.precision]
    if hasattr(config.data, "root"):
        words += ["--data.root", "FOLDER"]
    return shlex.join([*words, *(text for text in settings if text not in experiment.settings)])


def _kind(bits: dict[str, Any]) -> Device:
    return "gpu" if "CUDA" in bits else "cpu"


def _machine(starts: Sequence[AttemptRecord], known: Sequence[dict[str, Any]]) -> Machine:
    """Return what all attempts ran on, e.g. one card then another."""
    is_here = all(start.host == host() for start in starts)
    devices = _then([bits["device"] for bits in known])
    return Machine(kind=_kind(known[-1]), device=devices, cores=available_cpus() if is_here else None)


def _curve(epochs: Sequence[EpochRecord]) -> list[CurvePoint]:
    points, seconds = [], 0.0
    for epoch in epochs:
        seconds += epoch.seconds or 0.0
        points.append(
            CurvePoint(
                epoch=epoch.epoch + 1,
                minutes=round(seconds / 60, 3),
                train=_per_cent(epoch.train_accuracy),
                validation=_accuracy(epoch.validation),
                test=_accuracy(epoch.test),
            )
        )
    return points


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _accuracy(measured: SplitRecord | None) -> float | None:
    return None if measured is None else _per_cent(measured.accuracy)


def _per_cent(fraction: float | None) -> float | None:
    return None if fraction is None else _rounded(100 * fraction)


def _then(values: Sequence[object]) -> str:
    """Return e.g. `1 then 2`; each value once."""
    return " then ".join(dict.fromkeys(map(str, values)))
