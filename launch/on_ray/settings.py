"""Turns command-line arguments into a training on Ray workers, or a sweep of them. Imports no torch and no ray."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed.config import TrainConfig, with_values
from distributed.config.scaling import Scaling
from distributed.errors import InputError
from distributed.topology import Topology
from distributed.train import checked_config
from launch.sweep import Sweep, Trial, check_compared, check_trials, trial_arguments, trials_of

_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Training:
    """A training whose input is valid."""

    config: TrainConfig
    """The config that its workers get."""
    scaling: Scaling
    finished: bool
    name: str = ""
    """Its folder within that of the sweep, e.g. `optim.lr=0.1/seed-0`."""

    @property
    def sweep_folder(self) -> Path:
        """The folder of the sweep, which holds the run folders of all trials."""
        return self.config.run_dir.parents[self.name.count("/")]


def check_training(arguments: Sequence[str], *, name: str = "") -> Training:
    """Return the training that `[CONFIG.toml] [--SETTING VALUE ...]` describes.

    Raises:
        InputError: the arguments are invalid.
    """
    scaling = Scaling()

    def adapt(config: TrainConfig) -> TrainConfig:
        nonlocal scaling
        scaling = config.scaling or Scaling(gpus_per_worker=int(config.device == "cuda"))
        adapted = worker_config(config, scaling)
        if adapted.device != "auto" or adapted.exact.shards != "auto":
            adapted.check_world_size(scaling.num_workers, adapted.device)
        return adapted

    config, finished = checked_config(arguments, Topology(), adapt)
    return Training(config, scaling, finished, name)


def worker_config(config: TrainConfig, scaling: Scaling) -> TrainConfig:
    """Return the config for a worker: absolute paths, one thread per reserved core, no `scaling`.

    Raises:
        InputError: a path is relative, so that it would point elsewhere in a worker.
    """
    run_dir, shared = config.run_dir, scaling.storage_path
    if shared and run_dir.is_absolute():
        raise InputError(
            f"scaling.storage_path = {shared}: run_dir = {run_dir} is absolute already; leave one of them out"
        )
    if shared:
        run_dir = shared / run_dir
    paths = {"scaling.storage_path" if shared else "run_dir": run_dir, "init_from": config.init_from}
    for name in ("root", "cache"):
        if path := getattr(config.data, name, None):
            paths[f"data.{name}"] = path
    relative = [_relative_path(name, path) for name, path in paths.items() if path and not path.is_absolute()]
    if (mlflow := config.logging.mlflow) and (database := mlflow.relative_database):
        relative.append(
            f"logging.mlflow.tracking_uri = {mlflow.tracking_uri}: relative, but a worker runs in a folder of its own; "
            f"give an absolute path: sqlite:////SHARED/{database}"
        )
    if relative:
        raise InputError(*relative)
    # Ray shows all GPUs to a worker that reserves none.
    device = config.device if config.device != "auto" or scaling.gpus_per_worker else "cpu"
    threads = config.threads or scaling.cpus_per_worker
    return with_values(config, scaling=None, device=device, run_dir=run_dir, threads=threads)


def _relative_path(name: str, path: Path) -> str:
    example = ", or give --scaling.storage_path" if name == "run_dir" else f": --{name} {Path('/SHARED') / path}"
    return (
        f"{name} = {path}: relative, but a worker runs in a folder of its own; give an absolute path on storage that all nodes "
        f"share{example}"
    )


def sweep_trainings(arguments: Sequence[str], sweep: Sweep) -> list[Training]:
    """Return a training for each trial, each in a folder of its own within run_dir.

    Raises:
        InputError: one of them is invalid, or has no validation images to compare by.
    """

    def training(trial: Trial) -> Training:
        checked = check_training(trial_arguments(arguments, sweep, trial), name=trial.folder)
        check_compared(checked.config, sweep)
        return checked

    return check_trials(trials_of(sweep), training)


def check_address(address: str) -> None:
    """Check that something listens at the address of a Ray cluster; Ray itself would try for minutes.

    Raises:
        InputError: nothing listens there, or it is not an address.
    """
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    try:
        if "/" in host or not (host and port.isdecimal()):
            raise OSError(
                "should be HOST:PORT; from outside a cluster submit a job: ray job submit --address http://HOST:8265"
            )
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"environment: RAY_ADDRESS = {address}: {error}; start Ray there, name another, or unset it to start a Ray here"
        ) from None
