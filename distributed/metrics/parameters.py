"""The config as a flat table of parameters, for services that show runs beside each other."""

from typing import Any

from distributed.config import TrainConfig
from distributed.config.differences import flat
from distributed.errors import without_password


def parameters_of(config: TrainConfig) -> dict[str, str | int | float | bool]:
    """Return every setting by its dotted name, e.g. `optim.lr`; None as the word none, lists as text."""
    return {name: _plain(value) for name, value in flat(config.model_dump(mode="json")).items()}


def _plain(value: Any) -> str | int | float | bool:
    if isinstance(value, bool | int | float):
        return value
    return "none" if value is None else without_password(str(value))
