"""A config and its values as TOML. Imports no torch."""

from typing import Any

import tomli_w
from pydantic import BaseModel

from distributed.config.train_config import TrainConfig


def as_toml(config: TrainConfig) -> str:
    """Return the resolved config as TOML that reads back to an equal config."""
    return tomli_w.dumps(_without_none(config))


def toml_value(value: Any) -> str:
    """Return a setting's value as a config file spells it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())}}}"
    return tomli_w.dumps({"x": "none" if value is None else value}).removeprefix("x = ").strip()


def _without_none(section: BaseModel) -> dict[str, Any]:
    """Return the section without None, which TOML lacks: omitted if it is the default, else the word none."""
    tree: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            tree[name] = _without_none(value)
        elif isinstance(value, dict):
            tree |= {name: _spelled(plain[name])} if value else {}
        elif value is not None or field.default is not None:
            tree[name] = "none" if value is None else plain[name]
    return tree


def _spelled(value: Any) -> Any:
    """Return a value with the word none in place of None, in tables and lists too."""
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    return "none" if value is None else value
