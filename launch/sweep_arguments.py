"""Arguments of several trainings: sweeps on Slurm and Ray, and the tasks of a Slurm array. Imports no torch."""

import itertools
import re
import shlex
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distributed.config import from_command_line
from distributed.config.arguments import from_arguments
from distributed.errors import InputError


class SweepArguments(NamedTuple):
    """A parsed command line: the arguments common to all trainings, and the values to sweep for each setting."""

    common: list[str]
    sweep: dict[str, list[str]]


@dataclass(frozen=True)
class Combination:
    """One value for each setting of a sweep."""

    settings: tuple[tuple[str, str], ...]

    @property
    def arguments(self) -> list[str]:
        """The settings as arguments: `--optim.lr 0.1 --seed 1`."""
        return [argument for name, value in self.settings for argument in (f"--{name}", value)]

    @property
    def label(self) -> str:
        """The settings as one word, e.g. `optim.lr=0.1,seed=1`."""
        return ",".join(f"{name}={value}" for name, value in self.settings)

    @property
    def nested_folder(self) -> str:
        """A folder for each setting, e.g. `optim.lr=0.1/seed-1`."""
        return "/".join(f"seed-{value}" if name == "seed" else f"{name}={value}" for name, value in self.settings)


def split_sweep(arguments: Sequence[str], *, not_swept: Collection[str] = ()) -> SweepArguments:
    """Separate `--sweep.SETTING A,B` (or `--sweep SETTING=A,B`) and `--seeds N` from the other arguments.

    Args:
        not_swept: settings that this launcher cannot sweep, and prefixes of such settings, each ending in a dot.

    Raises:
        InputError: a setting without values, one given twice, or one that cannot be swept.
    """
    common, sweep, seeds = list[str](), dict[str, list[str]](), list[str]()
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        option, equals, text = argument.partition("=")
        if option not in ("--sweep", "--seeds") and not option.startswith("--sweep."):
            common.append(argument)
            continue
        if not equals:
            text = remaining.popleft() if remaining and not remaining[0].startswith("--") else ""
        if option == "--seeds":
            seeds = [str(seed) for seed in range(_seed_count(text))]
            continue
        setting, values = _swept_values(option, text)
        if setting in sweep:
            raise InputError(f"command line: --sweep.{setting}: given twice; remove one")
        if any(
            setting == name or (name.endswith(".") and setting.startswith(name)) for name in {"run_dir", *not_swept}
        ):
            raise InputError(f"command line: --sweep.{setting}: cannot be swept; sweep other settings of the training")
        sweep[setting] = values
    if seeds and "seed" in sweep:
        raise InputError("command line: --seeds and --sweep.seed: both choose the seeds; remove one")
    return SweepArguments(common, sweep | ({"seed": seeds} if seeds else {}))


def _swept_values(option: str, text: str) -> tuple[str, list[str]]:
    setting, listed = option.removeprefix("--sweep."), text
    if option == "--sweep":
        setting, _, listed = text.partition("=")
    values = [value for value in listed.split(",") if value]
    if not re.fullmatch(r"[\w.-]+", setting) or not values or len(set(values)) < len(values):
        raise InputError(
            f"command line: {f'{option} {text}'.strip()}: should be --sweep.SETTING VALUE,VALUE with different values, "
            "e.g. --sweep.optim.lr 0.1,0.01"
        )
    return setting, values


def _seed_count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 6 or int(text) < 1:
        raise InputError(
            f"command line: {f'--seeds {text}'.strip()}: should be a whole number of at least 1, e.g. --seeds 5"
        )
    return int(text)


def combinations(sweep: dict[str, list[str]]) -> list[Combination]:
    """Return every combination of the values of each setting."""
    choices = [[(name, value) for value in values] for name, values in sweep.items()]
    return [Combination(settings) for settings in itertools.product(*choices)]


def task_arguments(arguments: Sequence[str], task: int | None) -> list[str]:
    """Return the arguments of `distributed.train` for one task of an array; outside an array, all of them.

    `@FILE` stands for the line of FILE with the task's number. Without it, that number is the seed and each seed has a
    run folder of its own.

    Raises:
        InputError: FILE has no such line, or `--seed` is given as well.
    """
    if arguments and arguments[0].startswith("@"):
        lines = read_sweep_file(Path(arguments[0][1:]))
        if task is None or not 0 <= task < len(lines):
            reason = "this job is not an array" if task is None else f"it has no line for task {task}"
            raise InputError(f"{arguments[0]}: {reason}; submit it with --array=0-{len(lines) - 1}")
        return [*lines[task], *arguments[1:]]
    if task is None:
        return list(arguments)
    has_config = bool(arguments) and not arguments[0].startswith("-")
    if "seed" in from_arguments(arguments[1:] if has_config else arguments).places:
        raise InputError(
            "command line: --seed in an array: the task's number is the seed; remove --seed, or submit @FILE"
        )
    return in_subfolder(arguments, f"seed-{task}", "--seed", str(task))


def in_subfolder(arguments: Sequence[str], name: str, *more: str) -> list[str]:
    """Return the arguments and `more`, with the run folder, and the upload URL if any, replaced by a subfolder `name`."""
    config = from_command_line(arguments).config
    replaced = {"run_dir": str(config.run_dir / name)}
    if url := config.checkpoint.upload_to:
        replaced["checkpoint.upload_to"] = f"{url.rstrip('/')}/{name}"
    others = list[str]()
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        setting, equals, _ = argument.removeprefix("--").replace("-", "_").partition("=")
        if not argument.startswith("--") or setting not in replaced:
            others.append(argument)
        elif not equals and remaining:
            remaining.popleft()  # its value
    return [*others, *more, *(word for setting, value in replaced.items() for word in (f"--{setting}", value))]


def read_sweep_file(file: Path) -> list[list[str]]:
    """Return the arguments on each line of a sweep file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return [shlex.split(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"sweep file {file}: {error}; python -m launch.slurm writes such files") from None
