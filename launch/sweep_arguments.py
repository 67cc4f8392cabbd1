"""Reads a sweep from the command line and from the section `[sweep]` of a config: one grammar for Slurm and Ray.

Imports no torch.
"""

import re
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from distributed.config.arguments import value_of
from distributed.config.differences import flat
from distributed.config.hints import known, unknown
from distributed.config.layers import Settings, shown
from distributed.config.leaves import table_around
from distributed.config.named import config_file
from distributed.config.toml_file import from_file
from distributed.config.toml_text import toml_value
from distributed.errors import InputError
from distributed.files import with_home
from launch.distributions import EXAMPLES, Distribution, parse_distribution, split_at_commas
from launch.sweep import MAX_TRIALS, METRICS, Sweep

_SHORT = {"--seeds": "seeds", "--trials": "trials"}
_COUNTS = {"seeds": 1, "trials": 1, "trial_seed": 0}
"""Name of a number that describes the sweep itself -> the least it may be."""
_NOT_SWEPT = ("run_dir", "checkpoint.upload_to", "scaling", "sweep")


class Entry(NamedTuple):
    """The values of a setting in a sweep, or of an option of the sweep itself such as `trials`."""

    place: str
    """Where it was given and how it is spelled there, e.g. `command line: --sweep.optim.lr 0.1,0.2`."""
    values: list[str] | str
    """A text holds a list, separated by commas, or a distribution."""


class SplitArguments(NamedTuple):
    """A command line: the arguments that all trials share, and the text of each `--sweep.NAME`."""

    common: list[str]
    sweep: dict[str, str]

    @property
    def sweep_words(self) -> list[str]:
        """The options of the sweep as arguments."""
        return [f"--sweep.{name}={text}" for name, text in self.sweep.items()]


def split_sweep(arguments: Sequence[str]) -> SplitArguments:
    """Separate `--sweep.NAME VALUES` (or `--sweep NAME=VALUES`), `--seeds N` and `--trials N` from the other arguments.

    A distribution needs no `sweep.` before the setting: no setting has such a value.

    Raises:
        InputError: one is given twice, or has no name or no value.
    """
    common, sweep = list[str](), dict[str, str]()
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        option, equals, text = argument.partition("=")
        if _names_distribution(option, text if equals else next(iter(remaining), "")):
            option = f"--sweep.{option[2:]}"
        if option != "--sweep" and option not in _SHORT and not option.startswith("--sweep."):
            common.append(argument)
            continue
        if not equals:
            text = remaining.popleft() if remaining and not remaining[0].startswith("--") else ""
        if option == "--sweep" and text == "none":  # as for distributed.train: without the file's sweep
            common += ["--sweep", "none"]
            continue
        name = _SHORT.get(option, option.removeprefix("--sweep.").replace("-", "_"))
        values = text
        if option == "--sweep":
            name, _, values = text.partition("=")
            name = name.replace("-", "_")
        if name in sweep:
            raise InputError(f"command line: --sweep.{shown(name)}: given twice; remove one")
        if not re.fullmatch(r"[\w.-]+", name) or (not values and name not in _COUNTS):
            raise InputError(_malformed(f"command line: {shown(f'{option} {text}'.strip())}"))
        sweep[name] = values
    return SplitArguments(common, sweep)


def _names_distribution(option: str, text: str) -> bool:
    name = option.removeprefix("--").replace("-", "_")
    return option.startswith("--") and name in known() and text.partition("(")[0].strip() in EXAMPLES and "(" in text


def _malformed(place: str) -> str:
    return (
        f"{place}: should be --sweep.SETTING VALUE,VALUE with different values or a distribution, e.g. "
        '--sweep.optim.lr 0.1,0.01 or --sweep.optim.lr "log_uniform(1e-4, 1e-1)" --trials 20'
    )


def read_sweep(arguments: SplitArguments) -> Sweep | None:
    """Return the sweep of a command line and its config file; None if there is none. The command line has precedence.

    Raises:
        InputError: one line for each mistake.
    """
    in_file = _entries_of_file(arguments.common)
    typed = {name: Entry(_typed(name, text), text) for name, text in arguments.sweep.items()}
    entries = in_file | typed
    if not entries:
        return None
    mistakes, lists, distributions = list[str](), dict[str, list[str]](), dict[str, Distribution]()
    numbers = dict[str, int]()
    for name, entry in entries.items():
        try:
            if name in _COUNTS:
                numbers[name] = _count(name, entry)
            elif name == "metric":
                _check_metric(entry)
            elif isinstance(values := _values(name, entry), Distribution):
                distributions[name] = values
            else:
                lists[name] = values
        except InputError as error:
            mistakes += error.lines
    if "seeds" in entries and "seed" in entries:
        mistakes.append(f"{entries['seeds'].place} and sweep.seed: both choose the seeds; remove one")
    if not mistakes:
        mistakes = _conflicts(entries, lists, distributions)
    if mistakes:
        raise InputError(*mistakes)
    if seeds := numbers.get("seeds"):
        lists["seed"] = [str(seed) for seed in range(seeds)]
    metric = str(entries["metric"].values) if "metric" in entries else METRICS[0]
    return Sweep(
        lists, distributions, numbers.get("trials", 1), numbers.get("trial_seed", 0), metric, is_in_file=bool(in_file)
    )


def _typed(name: str, text: str) -> str:
    option = f"--{name}" if name in _SHORT.values() else f"--sweep.{name}"
    return f"command line: {option} {shown(text)}" if text else f"command line: {option}"


def _entries_of_file(common: Sequence[str]) -> dict[str, Entry]:
    """Return the entries of the config file's section `sweep`, unless `--sweep none` removes it."""
    if not common or common[0].startswith("-") or ("--sweep", "none") in pairwise(common):
        return {}
    file = config_file(with_home(common[0]))
    settings = from_file(file)
    section = settings.values.get("sweep")
    if section is None:
        return {}
    if not isinstance(section, dict):
        place = settings.places.get("sweep", shown(file))
        raise InputError(f"{place}: sweep = {shown(section)}: is a section; set its fields under [sweep]")
    return {name: _file_entry(name, value, settings) for name, value in flat(section).items()}


def _file_entry(name: str, value: Any, settings: Settings) -> Entry:
    place = f"{settings.places.get(f'sweep.{name}', 'config')}: sweep.{name} = {shown(value)}"
    return Entry(place, [_text(item) for item in value] if isinstance(value, list) else _text(value))


def _text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return value if isinstance(value, str) else toml_value(value)


def _values(name: str, entry: Entry) -> Distribution | list[str]:
    """Return the values of a setting."""
    if any(name == fixed or name.startswith(f"{fixed}.") for fixed in _NOT_SWEPT):
        raise InputError(f"{entry.place}: cannot be swept; sweep other settings")
    if name not in known() and not table_around(name):
        raise InputError(f"{entry.place}: {unknown(name)}")
    if isinstance(entry.values, str):
        try:
            if distribution := parse_distribution(entry.values):
                return distribution
        except ValueError as error:
            raise InputError(f"{entry.place}: {error}") from None
    values = split_at_commas(entry.values) if isinstance(entry.values, str) else entry.values
    if not values or len({_as_read(name, value) for value in values}) < len(values):
        if entry.place.startswith("command line"):
            raise InputError(_malformed(entry.place))
        raise InputError(
            f'{entry.place}: should be a list of different values or a distribution, e.g. "log_uniform(1e-4, 1e-1)"'
        )
    return values


def _as_read(name: str, text: str) -> Any:
    """Return a value as the command line reads it, so that 1, 1.0 and 1e0 are equal; a list or table as text."""
    value = value_of(name, text)
    return (type(value) is bool, value) if isinstance(value, int | float | str) else repr(value)


def _count(name: str, entry: Entry) -> int:
    text, least = entry.values, _COUNTS[name]
    is_count = isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10
    if not is_count or not least <= int(str(text)):
        raise InputError(f"{entry.place}: should be a whole number of at least {least}, e.g. 5")
    if name != "trial_seed" and int(str(text)) > MAX_TRIALS:
        raise InputError(f"{entry.place}: should be at most {MAX_TRIALS:,}")
    return int(str(text))


def _check_metric(entry: Entry) -> None:
    if entry.values not in METRICS:
        raise InputError(f"{entry.place}: should be one of {' | '.join(METRICS)}; test images never choose a trial")


def _conflicts(
    entries: dict[str, Entry], lists: dict[str, list[str]], distributions: dict[str, Distribution]
) -> list[str]:
    """Return one line for each option of the sweep that is missing or would have no effect."""
    if distributions and "trials" not in entries:
        first = entries[next(iter(distributions))]
        return [
            f"{first.place}: a distribution needs the number of trials; add --trials 20, or trials = 20 under [sweep]"
        ]
    if distributions:
        return []
    useless = [entries[name].place for name in ("trials", "trial_seed") if name in entries]
    reason = "no setting has a distribution, and lists are trained in every combination"
    if not useless and not lists and "seeds" not in entries:
        return [f"{entries['metric'].place}: no setting is swept; add one, e.g. --sweep.optim.lr 0.1,0.05"]
    return [f"{place}: has no effect: {reason}; remove it" for place in useless]
