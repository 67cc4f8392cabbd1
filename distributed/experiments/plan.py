"""The command line of `train` for each run of an experiment. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distributed.config import TrainConfig, from_command_line
from distributed.config.arguments import from_arguments
from distributed.experiments.catalogue import Experiment
from distributed.host.shipped import shipped
from distributed.run.folder import RunFolder


@dataclass(frozen=True)
class PlannedRun:
    """A run to train: its experiment, its folder, and the command line of `train`."""

    experiment: Experiment
    folder: RunFolder
    arguments: tuple[str, ...]


def planned_run(experiment: Experiment, seed: int, runs: Path, settings: Sequence[str]) -> PlannedRun:
    """Return a run, whose command line has been checked: torchrun would hide exit code 2.

    Args:
        runs: folder of the run folders.
        settings: the user's, which replace those of the catalogue.

    Raises:
        InputError: the settings are invalid, or the config does not exist.
    """
    folder = RunFolder(runs / f"{experiment.id}-{seed}")
    given = from_arguments(settings).places
    planned = [text for text in planned_arguments(experiment) if setting_path(text) not in given]
    arguments = (*planned, "--seed", str(seed), "--run_dir", str(folder.path), *settings)
    from_command_line(arguments)
    return PlannedRun(experiment, folder, arguments)


def planned_arguments(experiment: Experiment) -> list[str]:
    """Return the command line of `train` that the catalogue describes, without the seed."""
    return [str(shipped(experiment.config)), *experiment.settings]


@cache
def planned_config(experiment: Experiment) -> TrainConfig:
    """Return the config that the catalogue describes."""
    return from_command_line(planned_arguments(experiment)).config


def setting_path(setting: str) -> str:
    """Return the dotted path in `--PATH=VALUE`."""
    return setting.removeprefix("--").partition("=")[0]
