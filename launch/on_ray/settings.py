"""From the words of a command to what Ray workers are given: one training, or a sweep of them. Imports no torch and no ray."""

import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed.config import TrainConfig, with_values
from distributed.config.sections import Scaling
from distributed.errors import InputError
from distributed.topology import Topology
from distributed.train import checked_config
from launch.sweep_arguments import with_folder


@dataclass(frozen=True)
class Training:
    """A training whose input is right. `name` says what sets it apart in a sweep, as `optim.lr=0.1`."""

    config: TrainConfig
    """As its workers are given it."""
    scaling: Scaling
    finished: bool
    name: str = ""


def checked(words: Sequence[str], *, name: str = "") -> Training:
    """The training that `[CONFIG.toml] [--SETTING VALUE ...]` describes.

    Raises:
        InputError: anything that cannot be used.
    """
    asked = Scaling()

    def adapt(config: TrainConfig) -> TrainConfig:
        nonlocal asked
        asked = config.scaling or Scaling(gpus_per_worker=int(config.device == "cuda"))
        adapted = without_scaling(config, asked)
        if adapted.device != "auto" or adapted.exact.shards != "auto":
            adapted.check_world_size(asked.num_workers, adapted.device)
        elif not asked.gpus_per_worker:
            adapted.check_world_size(asked.num_workers, "cpu")
        return adapted

    config, finished = checked_config(words, Topology(), adapt)
    return Training(config, asked, finished, name)


def without_scaling(config: TrainConfig, scaling: Scaling) -> TrainConfig:
    """The config as a worker is given it: paths that mean the same everywhere, and the threads of its cores.

    Raises:
        InputError: a path that means something else in a worker.
    """
    run_dir = config.run_dir
    if scaling.storage_path and run_dir.is_absolute():
        raise InputError(
            f"scaling.storage_path = {scaling.storage_path}: run_dir = {run_dir} is absolute already; leave one of them out"
        )
    if scaling.storage_path:
        run_dir = scaling.storage_path / run_dir
    paths = {"run_dir" if not scaling.storage_path else "scaling.storage_path": run_dir, "init_from": config.init_from}
    for name in ("root", "cache"):
        if path := getattr(config.data, name, None):
            paths[f"data.{name}"] = path
    relative = [
        f"{name} = {path}: relative, and a worker runs in a folder of its own; give it from the root, on storage that "
        f"all nodes see{remedy}"
        for name, path in paths.items()
        if path and not path.is_absolute()
        for remedy in [
            ", or give --scaling.storage_path" if name == "run_dir" else f": --{name} {Path('/SHARED') / path}"
        ]
    ]
    if relative:
        raise InputError(*relative)
    return with_values(config, scaling=None, run_dir=run_dir, threads=config.threads or scaling.cpus_per_worker)


def without_sweep(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words without `--sweep.SETTING A,B`, and the values of each setting.

    Raises:
        InputError: no values, or a setting that is swept twice.
    """
    rest: list[str] = []
    sweep: dict[str, list[str]] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--sweep."):
            rest.append(word)
            continue
        setting, equals, text = word.removeprefix("--sweep.").partition("=")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else ""
        values = [value for value in text.split(",") if value]
        if not setting or not values or len(set(values)) < len(values):
            raise InputError(
                f"command line: {word} {text}: should be --sweep.SETTING VALUE,VALUE, as --sweep.optim.lr 0.1,0.01"
            )
        if setting in sweep or setting in ("run_dir", "epochs") or setting.startswith("scaling"):
            raise InputError(
                f"command line: --sweep.{setting}: given twice, or cannot be swept; sweep other settings of the training"
            )
        sweep[setting] = values
    return rest, sweep


def swept(words: Sequence[str], sweep: dict[str, list[str]]) -> list[Training]:
    """A training for each combination of values, each in a folder of its own within run_dir.

    Raises:
        InputError: one that cannot be used, or no validation images to choose the best by.
    """
    trainings = []
    for values in itertools.product(*sweep.values()):
        name = ",".join(f"{setting}={value}" for setting, value in zip(sweep, values, strict=True))
        more = [word for setting, value in zip(sweep, values, strict=True) for word in (f"--{setting}", value)]
        trainings.append(checked(with_folder(words, name, *more), name=name))
        config = trainings[-1].config
        if not config.data.validation_fraction:
            raise InputError(
                "data.validation_fraction = 0: a sweep chooses the best by validation, never by test images; hold some out"
            )
    return trainings


def check_address(address: str) -> None:
    """Raises InputError where no cluster can be at an address; Ray itself would try for minutes."""
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        if "/" in host or not (host and port.isdecimal()):
            raise OSError(
                "should be HOST:PORT; from outside a cluster submit a job: ray job submit --address http://HOST:8265"
            )
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"environment: RAY_ADDRESS = {address}: {error}; start Ray there, name another, or unset it for a Ray of its own"
        ) from None
