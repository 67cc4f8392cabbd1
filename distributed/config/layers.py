"""Settings with the place where each was set. Newer settings override older ones. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from distributed.config.leaves import has_name, leaves, sections_of
from distributed.config.train_config import TrainConfig

Tree = dict[str, Any]
MAX_DEPTH = 8
"""Levels of tables and lists that are read; no setting is deeper than 3."""


@dataclass
class Settings:
    """Values as a nested dict, and where each dotted path was last set (`configs/cifar10.toml:7`, `command line`).

    `mistakes` has a line for each input that is not a setting.
    """

    values: Tree = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def override(self, newer: "Settings") -> None:
        """Override these with `newer`. A section that changes its `name` keeps only what the new variant shares."""
        self.values = _merged(self.values, newer.values)
        self.places |= newer.places
        self.mistakes += newer.mistakes


def _merged(older: Tree, newer: Tree, *, are_sections: bool = True) -> Tree:
    result = dict(older)
    for key, value in newer.items():
        previous = older.get(key)
        if not (isinstance(value, dict) and isinstance(previous, dict)):
            result[key] = value
            continue
        if are_sections and "name" in value and value["name"] != previous.get("name", _default_name(key)):
            shared = _fields_of_variant(key, value["name"])
            previous = {k: v for k, v in previous.items() if k in shared}
        result[key] = _merged(previous, value, are_sections=False)
    return result


def _default_name(section: str) -> str | None:
    field_info = TrainConfig.model_fields.get(section)
    return getattr(field_info.default, "name", None) if field_info else None


def _fields_of_variant(section: str, name: Any) -> set[str]:
    field_info = TrainConfig.model_fields.get(section)
    for variant in sections_of(field_info.annotation) if field_info else []:
        if "name" in variant.model_fields and has_name(variant, name):
            return set(variant.model_fields)
    return set()


def dotted_paths(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every section and value."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        yield from dotted_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def is_deep(value: Any) -> bool:
    """Return whether tables and lists are nested deeper than any setting. Iterative, so it works at any depth."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


@cache
def text_settings() -> frozenset[str]:
    """Return the dotted paths of settings that may hold any text."""
    return frozenset(leaf.path for leaf in leaves() if leaf.takes_text)


def settings_without_none() -> frozenset[str]:
    """Return the dotted paths of settings in which the word none is text like any other."""
    return frozenset(leaf.path for leaf in leaves() if not leaf.takes_none)


def shown(value: Any) -> str:
    """Return a value as it is shown in a message: on one line and not too long."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = "none" if value is None else str(value)
    except (ValueError, RecursionError):  # e.g. a hexadecimal number of thousands of digits
        return f"(a value of type {type(value).__name__}, too large to show)"
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text):,} characters)"
