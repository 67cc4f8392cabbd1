"""Builds configs from command-line arguments."""

from pathlib import Path

import pytest

from distributed.config import TrainConfig, from_command_line
from distributed.errors import InputError


def config_of(*arguments: str | Path) -> TrainConfig:
    return from_command_line([str(argument) for argument in arguments]).config


def mistakes(*arguments: str | Path) -> tuple[str, ...]:
    """Return the lines of the error that refuses these arguments."""
    with pytest.raises(InputError) as caught:
        config_of(*arguments)
    return caught.value.lines
