"""The training of one task of a Slurm array: a trial of the sweep, or else a seed. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed.config import from_command_line
from distributed.config.arguments import from_arguments
from distributed.errors import InputError
from launch.sweep import in_subfolder, trial_arguments, trials_of
from launch.sweep_arguments import read_sweep, split_sweep


@dataclass(frozen=True)
class Task:
    """The arguments of `distributed.train` for one job or one task of an array."""

    arguments: list[str]
    folder: Path | None = None
    """The folder with the runs of all tasks; None outside an array."""
    metric: str = ""
    """What the best trial of the sweep is chosen by; empty if there is no sweep."""


def task_of(arguments: Sequence[str], index: int | None) -> Task:
    """Return the task with this number in the array; outside an array, the training that the arguments describe.

    A sweep's trial has the task's number. Without a sweep, that number is the seed and each seed has its own run folder.

    Raises:
        InputError: there is no such trial, the sweep is invalid, or `--seed` is given as well.
    """
    split = split_sweep(arguments)
    if sweep := read_sweep(split):
        trials = trials_of(sweep)
        if index is None or not 0 <= index < len(trials):
            reason = "this job is not an array" if index is None else f"it has no trial {index}"
            raise InputError(f"sweep: {reason}; submit it with --array=0-{len(trials) - 1}, or python -m launch.slurm")
        trial = trials[index]
        own = trial_arguments(split.common, sweep, trial)
        return Task(own, _folder_around(own, trial.folder), sweep.metric)
    if index is None:
        return Task(list(arguments))
    has_config = bool(arguments) and not arguments[0].startswith("-")
    if "seed" in from_arguments(arguments[1:] if has_config else arguments).places:
        raise InputError(
            "command line: --seed in an array: the task's number is the seed; remove --seed, or sweep it: --sweep.seed 1,2"
        )
    own = in_subfolder(arguments, f"seed-{index}", "--seed", str(index))
    return Task(own, _folder_around(own, f"seed-{index}"))


def _folder_around(arguments: Sequence[str], subfolder: str) -> Path:
    """Return the parent folder of all trials; these are the arguments of one of them."""
    return from_command_line(arguments).config.run_dir.absolute().parents[subfolder.count("/")]


def indices(tasks: Sequence[int]) -> str:
    """Return task numbers, which ascend, in Slurm's notation: `0-3,5`."""
    ranges: list[list[int]] = []
    for task in tasks:
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges)
