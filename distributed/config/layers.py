"""Where settings come from: TOML files with `extends`, then the command line, each value with its place."""

import os
import re
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from distributed.config.hints import known, unknown
from distributed.config.leaves import leaves, sections_of
from distributed.config.named import config_file
from distributed.config.renamed import RENAMED, upgraded
from distributed.config.train_config import TrainConfig
from distributed.errors import InputError
from distributed.files import read_at_most, with_home

Tree = dict[str, Any]
_LARGEST_FILE = 2**20  # bytes; a config of every setting has 5,000
_DEEPEST = 8  # levels; no setting is deeper than 3
_LONGEST_CHAIN = 32  # files that extend each other


@dataclass
class Settings:
    """Values as a nested dict, and the place each dotted path was set last (`configs/cifar10.toml:7`, `command line`).

    `mistakes` are lines on what could not be read as a setting at all.
    """

    values: Tree = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def override(self, newer: "Settings") -> None:
        """Lay `newer` over these. A section that changes its `name` keeps only what the new variant has too."""
        self.values = _merged(self.values, newer.values)
        self.places |= newer.places
        self.mistakes += newer.mistakes


def _merged(older: Tree, newer: Tree) -> Tree:
    result = dict(older)
    for key, value in newer.items():
        below = older.get(key)
        if not (isinstance(value, dict) and isinstance(below, dict)):
            result[key] = value
            continue
        if "name" in value and value["name"] != below.get("name", _default_name(key)):
            kept = _fields_of_variant(key, value["name"])
            below = {k: v for k, v in below.items() if k in kept or f"{key}.{k}" in RENAMED}
        result[key] = _merged(below, value)
    return result


def _default_name(section: str) -> str | None:
    field_info = TrainConfig.model_fields.get(section)
    return getattr(field_info.default, "name", None) if field_info else None


def _fields_of_variant(section: str, name: str) -> set[str]:
    field_info = TrainConfig.model_fields.get(section)
    for variant in sections_of(field_info.annotation) if field_info else []:
        if name in getattr(variant.model_fields["name"].annotation, "__args__", ()):
            return set(variant.model_fields)
    return set()


def from_file(path: Path, *, saved: bool = False, extended_by: tuple[str, ...] = ()) -> Settings:
    """Return the settings of a TOML file over those of the file that its `extends` names (beside it, or a shipped one).

    Args:
        saved: the file is a run's own config.toml, which may have been written by an earlier version.

    Raises:
        InputError: no such file, not TOML, or a file that extends itself.
    """
    here, name = os.path.realpath(path), shown(path)  # not resolve(), which raises at links that lead in a circle
    if here in extended_by:
        raise InputError(f"{name}: extends leads back to this file; remove one `extends`")
    if len(extended_by) >= _LONGEST_CHAIN:
        raise InputError(f"{name}: `extends` chain of more than {_LONGEST_CHAIN} files; merge some of them")
    text, values = _parsed(path, name)
    base = values.pop("extends", None)
    lines = dict(_lines_of_keys(text))
    if saved:
        lines = {RENAMED.get(key, key): line for key, line in lines.items()}
        try:
            values = upgraded(values)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
    settings = Settings()
    if base is not None:
        if not isinstance(base, str) or not base or "\0" in base:
            raise InputError(f"{name}: extends = {shown(base)}: must be the name of one file, in quotes")
        settings = from_file(config_file(with_home(base), beside=path.parent), extended_by=(*extended_by, here))
    places = dict.fromkeys(dotted_paths(values), name) | {key: f"{name}:{line}" for key, line in lines.items()}
    settings.override(Settings(_with_none(values), places))
    return settings


def dotted_paths(tree: Tree, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        yield from dotted_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def _parsed(path: Path, name: str) -> tuple[str, Tree]:
    """The text of a TOML file and what it says."""
    try:
        text = read_at_most(path, _LARGEST_FILE).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        raise InputError(f"config file {name}: {reason}; the first argument names a TOML file") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise InputError(f"{name}: not valid TOML: {error}; correct that line, or name another file") from None
    if _is_deep(values):
        raise InputError(
            f"{name}: sections or values are nested more than {_DEEPEST} deep, and no setting is; remove them"
        )
    return text, values


def _is_deep(value: Any) -> bool:
    """Whether tables and lists are nested deeper than any setting; without recursion."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


def shown(value: Any) -> str:
    """A value in a message: on one line, not endless."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = "none" if value is None else str(value)
    except (ValueError, RecursionError):  # e.g. a hexadecimal number of thousands of digits
        return f"(a value of type {type(value).__name__}, too large to show)"
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text):,} characters)"


def _with_none(tree: Tree, prefix: str = "") -> Tree:
    """The word none as no value, except where a text is meant: TOML has no null."""
    result: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            result[key] = _with_none(value, f"{path}.")
        else:
            result[key] = None if value == "none" and path not in _text_settings() else value
    return result


@cache
def _text_settings() -> frozenset[str]:
    return frozenset(leaf.path for leaf in leaves() if leaf.takes_text)


def _lines_of_keys(text: str) -> list[tuple[str, int]]:
    """(dotted path, line number) of each key of a TOML text; good enough to point a reader at the right line."""
    found, section = [], ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(r"\s*\[\[?([\w.\"-]+)\]", line):
            section = header[1].replace('"', "") + "."
            found.append((section[:-1], number))
        elif key := re.match(r"\s*(\"?)([\w.-]+)\1\s*=", line):
            found.append((section + key[2], number))
    return found


def from_arguments(arguments: Sequence[str]) -> Settings:
    """`--optim.lr 0.05`, `--optim.lr=0.05`, or a bare `--flag` for true, as settings. Dashes in a name count as underscores.

    A word that is no option, an option without its value or given twice is among the mistakes.
    """
    settings, words = Settings(), deque(arguments)
    while words:
        word = words.popleft()
        if not re.match(r"--\w", word):
            settings.mistakes.append(f"{word[:200]!r}: not an option; settings are given as --name value")
            continue
        name, equals, text = word[2:].partition("=")
        path = name.replace("-", "_")
        if not equals:
            if words and not re.match(r"--[a-zA-Z]", words[0]):
                text = words.popleft()
            elif path in _flags():
                text = "true"
            else:
                settings.mistakes.append(f"--{shown(name)}: {_without_value(path)}")
                continue
        if path in settings.places:
            settings.mistakes.append(f"--{shown(path)}: given twice; remove one")
            continue
        if path.count(".") < _DEEPEST:
            _put(settings.values, path, _value(path, text))
        else:
            settings.mistakes.append(f"--{shown(path)}: {unknown(path)}")
        settings.places[path] = "command line"
    settings.mistakes = [f"command line: {mistake}" for mistake in settings.mistakes]
    return settings


@cache
def _flags() -> frozenset[str]:
    return frozenset(leaf.path for leaf in leaves() if leaf.annotation is bool)


def _without_value(path: str) -> str:
    """What is wrong with an option that no value follows."""
    if path in known() or any(setting.startswith(f"{path}.") for setting in known()):
        return f"a value is missing; write --{path} VALUE"
    return unknown(path)


def _put(tree: Tree, path: str, value: Any) -> None:
    """Set a dotted path, whatever the order of options; a section given as a plain value stays wrong."""
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return
    tree[key] = value


def _value(path: str, text: str) -> Any:
    """The text as what TOML would read (`0.05`, `true`, `[1, 2]`), `none` as no value, else as it stands."""
    if path in _text_settings():
        return text
    if text.lower() == "none":
        return None
    if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)  # `.05` and `5.`, which TOML does not know
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return text if _is_deep(value) else value
