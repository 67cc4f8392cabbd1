"""Builds a validated `TrainConfig` from a command line, from Python or from a run folder. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from distributed.config.arguments import from_arguments
from distributed.config.layers import Settings, dotted_paths
from distributed.config.messages import explain
from distributed.config.named import config_file
from distributed.config.toml_file import from_file
from distributed.config.train_config import TrainConfig
from distributed.config.validate import validated
from distributed.errors import InputError
from distributed.files import with_home

_NAMES_DATA = {"data", "data.name", "data.root", "data.download", "data.urls"}
"""Settings that count as choosing a data set."""


@dataclass(frozen=True)
class CommandLine:
    """The config that a command line describes."""

    config: TrainConfig
    names_data: bool
    """Whether it names a config file or a data set, so that generated images must not replace missing data."""


def from_command_line(arguments: Sequence[str], *, default_data: str = "cifar10") -> CommandLine:
    """Return the config that `[CONFIG] [--SETTING VALUE ...]` describes.

    CONFIG is a TOML file or the name of a shipped config.

    Args:
        default_data: the data set if the command line names none.

    Raises:
        InputError: every invalid setting, one per line; conflicts between settings once each of them is valid.
    """
    options = list(arguments)
    file = config_file(with_home(options.pop(0))) if options and not options[0].startswith("-") else None
    overrides = from_arguments(options)
    config = _resolved(file, overrides, default_data=default_data)
    return CommandLine(config, names_data=bool(file or _NAMES_DATA & overrides.places.keys()))


def load_config(config: str | Path | None = None, /, **settings: Any) -> TrainConfig:
    """Return a config as on the command line: `load_config("cifar10", epochs=3, optim={"lr": 0.1})`.

    Args:
        config: a TOML file or the name of a shipped config; without one, the defaults apply.
        settings: values that replace those of the file; a section is a dict of the values to replace.

    Raises:
        InputError: every invalid setting, one per line; conflicts between settings once each of them is valid.
    """
    file = None if config is None else config_file(with_home(str(config)))
    values = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in settings.items()}
    overrides = Settings(values, dict.fromkeys(dotted_paths(values), "load_config()"))
    return _resolved(file, overrides, default_data="cifar10")


def _resolved(file: Path | None, overrides: Settings, *, default_data: str) -> TrainConfig:
    """Return the validated config, in which these settings override those of the file."""
    settings = Settings({"data": {"name": default_data}})
    if file:
        settings.override(from_file(file))
    settings.override(overrides)
    config = validated(settings)
    if file and _is_saved_by_a_run(file) and "run_dir" not in overrides.values:
        # The run may have been moved, or its folder been relative to another one.
        is_there = config.run_dir.resolve() == file.parent.resolve()
        return config if is_there else with_values(config, run_dir=file.parent)
    if "run_dir" in settings.values:
        return config
    return with_values(
        config, run_dir=Path("runs") / (file.stem if file else f"{config.model.short_name}-{config.data.short_name}")
    )


def read_saved(file: Path) -> TrainConfig:
    """Return the config in a run's own config.toml.

    Raises:
        InputError: it cannot be read or has invalid settings.
    """
    return validated(from_file(file))


def from_saved(values: dict[str, Any]) -> TrainConfig:
    """Return the config that a checkpoint's state.json holds.

    Raises:
        InputError: it has settings that this version cannot read.
    """
    return validated(Settings(values))


def _is_saved_by_a_run(file: Path) -> bool:
    """Return whether a config file is the one that a run wrote into its own folder."""
    return file.name == "config.toml" and (file.parent / "status.json").is_file()


def with_values(config: TrainConfig, **values: Any) -> TrainConfig:
    """Return a copy with some top-level values replaced.

    Raises:
        InputError: one of them is invalid, or conflicts with others.
    """
    try:
        return TrainConfig.model_validate({**dict(config), **values})
    except ValidationError as error:
        found = [line for detail in error.errors(include_url=False) for line in explain(detail, Settings(values))]
        raise InputError(*found) from None
