"""The trials of a sweep. The list depends only on the sweep and is stored nowhere, so every launcher computes the same.

Imports no torch.
"""

import hashlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from distributed.config import TrainConfig, from_command_line
from distributed.errors import InputError, counted
from launch.distributions import Distribution

T = TypeVar("T")

MAX_TRIALS = 10_000
METRICS = ("validation.accuracy", "validation.loss")
"""What the best trial is chosen by; the first is the default."""
_MAX_REDRAWS = 10_000
_MAX_LINES = 20
_MAX_NAME_BYTES = 200  # of 255, so that files beside the run folder can add to its name


@dataclass(frozen=True)
class Sweep:
    """A parsed sweep: every combination of the lists, for each of `draws` draws from the distributions."""

    lists: dict[str, list[str]]
    distributions: dict[str, Distribution]
    draws: int = 1
    trial_seed: int = 0
    metric: str = METRICS[0]
    is_in_file: bool = False
    """Whether the config file has a section `sweep`."""


@dataclass(frozen=True)
class Trial:
    """One training of a sweep: its place in the list and its values."""

    index: int
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
    def folder(self) -> str:
        """The run folder within the sweep's: `optim.lr=0.1,optim.momentum=0.9/seed-1`."""
        others = _as_name(",".join(f"{name}={value}" for name, value in self.settings if name != "seed"))
        seed = next((f"seed-{_as_name(value)}" for name, value in self.settings if name == "seed"), "")
        return "/".join(name for name in (others, seed) if name)

    @property
    def title(self) -> str:
        """The trial as messages name it."""
        return f"trial {self.index} ({self.label})"


def _as_name(text: str) -> str:
    """Return a text as the name of a folder; one that has to be changed gets a digest, so that no two become equal."""
    name = text.replace("/", "_").replace("\0", "_")
    if name == text and len(text.encode()) <= _MAX_NAME_BYTES:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name.encode()[: _MAX_NAME_BYTES - 9].decode(errors='ignore')}~{digest}"


def as_url_path(name: str) -> str:
    """Return a folder's name as part of an object store's URL; one that has to be changed gets a digest."""
    changed = re.sub(r"[\s?*#\[\]{}]", "_", name)
    return name if changed == name else f"{changed}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def trials_of(sweep: Sweep) -> list[Trial]:
    """Return the trials of a sweep: for each draw, every combination of the lists, seeds last.

    A larger number of draws extends the list; it does not change the trials before.

    Raises:
        InputError: there are too many, or too few different draws.
    """
    combinations = 1
    for values in sweep.lists.values():
        combinations *= len(values)
    if sweep.draws * combinations > MAX_TRIALS:
        raise InputError(
            f"sweep: {sweep.draws * combinations:,} trials; should be at most {MAX_TRIALS:,}: sweep fewer values"
        )
    # The seed stays last, so that the runs of one setting are neighbors.
    lists = sorted(sweep.lists.items(), key=lambda entry: entry[0] == "seed")
    grid = list(itertools.product(*([(name, value) for value in values] for name, values in lists)))
    draws = _draws(sweep) if sweep.distributions else [()]
    return [Trial(index, (*draw, *one)) for index, (draw, one) in enumerate(itertools.product(draws, grid))]


def check_compared(config: TrainConfig, sweep: Sweep) -> None:
    """Check that the trials of different settings can be compared.

    Raises:
        InputError: a trial has no validation images.
    """
    has_settings = bool(sweep.distributions) or any(name != "seed" for name in sweep.lists)
    if has_settings and not config.data.validation_fraction:
        raise InputError(
            "data.validation_fraction = 0: a sweep chooses the best trial by validation images, never by test images; set it "
            "above 0, e.g. 0.1"
        )


def _draws(sweep: Sweep) -> list[tuple[tuple[str, str], ...]]:
    """Return the values of each draw. A draw equal to an earlier one is repeated: it would train the same again."""
    found = dict[tuple[tuple[str, str], ...], None]()
    for index in range(sweep.draws):
        for attempt in range(_MAX_REDRAWS):
            draw = tuple(
                (name, distribution.draw(sweep.trial_seed, index, attempt, name))
                for name, distribution in sweep.distributions.items()
            )
            if draw not in found:
                found[draw] = None
                break
        else:
            raise InputError(
                f"sweep: trials = {sweep.draws}, but only {len(found)} different draws were found; lower trials, or widen "
                "the distributions"
            )
    return list(found)


def trial_arguments(common: Sequence[str], sweep: Sweep, trial: Trial) -> list[str]:
    """Return the arguments of `distributed.train` for a trial, with a run folder of its own.

    Raises:
        InputError: a setting is invalid.
    """
    own = ["--sweep", "none"] if sweep.is_in_file else []
    return in_subfolder(common, trial.folder, *trial.arguments, *own)


def in_subfolder(arguments: Sequence[str], name: str, *more: str) -> list[str]:
    """Return the arguments and `more`, with the run folder, and the upload URL if any, replaced by a subfolder `name`."""
    config = from_command_line([*arguments, *more]).config
    replaced = {"run_dir": str(config.run_dir / name)}
    if url := config.checkpoint.upload_to:
        replaced["checkpoint.upload_to"] = f"{url.rstrip('/')}/{as_url_path(name)}"
    return with_settings([*arguments, *more], replaced)


def with_settings(arguments: Sequence[str], replaced: Mapping[str, str]) -> list[str]:
    """Return the arguments with these settings, in place of the same settings if they are given."""
    others = list[str]()
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        setting, equals, _ = argument.removeprefix("--").replace("-", "_").partition("=")
        if not argument.startswith("--") or setting not in replaced:
            others.append(argument)
        elif not equals and remaining:
            remaining.popleft()  # its value
    return [*others, *(word for setting, value in replaced.items() for word in (f"--{setting}", value))]


def check_trials(trials: Sequence[Trial], check: Callable[[Trial], T]) -> list[T]:
    """Return `check(trial)` for each trial.

    Raises:
        InputError: some trials are invalid; one line for each mistake, with the first trial that has it.
    """
    results, mistakes = list[T](), dict[str, list[Trial]]()
    for trial in trials:
        try:
            results.append(check(trial))
        except InputError as error:
            for line in error.lines:
                mistakes.setdefault(line, []).append(trial)
    if not mistakes:
        return results
    lines = list(_with_trials(mistakes, len(trials)))
    more = len(lines) - _MAX_LINES
    raise InputError(*lines[:_MAX_LINES], *([f"and {counted(more, 'more mistake')}"] if more > 0 else []))


def _with_trials(mistakes: dict[str, list[Trial]], count: int) -> Iterator[str]:
    for line, affected in mistakes.items():
        if len(affected) == count > 1:
            yield line  # not a matter of any trial
        elif len(affected) == 1:
            yield f"{affected[0].title}: {line}"
        else:
            yield f"{affected[0].title} and {len(affected) - 1} more: {line}"
