"""Where settings come from: TOML files with `extends`, then the command line, each value with its place."""

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed.config.fields import leaves, sections_of
from distributed.config.named import config_file
from distributed.config.tree import TrainConfig
from distributed.errors import InputError

Tree = dict[str, Any]


@dataclass
class Settings:
    """Values as a nested dict, and the place each dotted path was set last (`configs/cifar10.toml:7`, `command line`)."""

    values: Tree = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def override(self, newer: "Settings") -> None:
        """Lay `newer` over these. A section that changes its `name` keeps only what the new variant has too."""
        self.values = _merged(self.values, newer.values)
        self.places |= newer.places


def _merged(older: Tree, newer: Tree) -> Tree:
    result = dict(older)
    for key, value in newer.items():
        below = older.get(key)
        if not (isinstance(value, dict) and isinstance(below, dict)):
            result[key] = value
            continue
        if "name" in value and value["name"] != below.get("name", _default_name(key)):
            below = {k: v for k, v in below.items() if k in _fields_of_variant(key, value["name"])}
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


def from_file(path: Path, *, extended_by: tuple[str, ...] = ()) -> Settings:
    """The settings of a TOML file over those of the file that its `extends` names (relative to itself, or a shipped one).

    Raises:
        InputError: no such file, not TOML, or a file that extends itself.
    """
    here = os.path.realpath(path)  # not resolve(), which raises at links that lead in a circle
    if here in extended_by:
        raise InputError(f"{path}: extends leads back to this file; remove one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        raise InputError(f"config file {shown(path)}: {reason}; the first argument names a TOML file") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise InputError(f"{path}: not valid TOML: {error}; mend that line, or name another file") from None
    base = values.pop("extends", None)
    settings = Settings()
    if base is not None:
        if not isinstance(base, str) or not base or "\0" in base:
            raise InputError(f"{path}: extends = {base!r}: must be the name of one file, in quotes")
        settings = from_file(config_file(base, beside=path.parent), extended_by=(*extended_by, here))
    settings.override(Settings(_with_none(values), {key: f"{path}:{line}" for key, line in _lines_of_keys(text)}))
    return settings


def shown(value: Any) -> str:
    """A value in a message: on one line, not endless."""
    if isinstance(value, bool):
        return str(value).lower()
    text = "none" if value is None else str(value)
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
            result[key] = None if value == "none" and not _takes_text(path) else value
    return result


def _takes_text(path: str) -> bool:
    return any(leaf.path == path and leaf.takes_text for leaf in leaves())


def _lines_of_keys(text: str) -> list[tuple[str, int]]:
    """(dotted path, line number) of each key of a TOML text; good enough to point a reader at the right line."""
    found, section = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\[?([\w.\"-]+)\]", line):
            section = header[1].replace('"', "") + "."
            found.append((section[:-1], number))
        elif key := re.match(r"\s*(\"?)([\w.-]+)\1\s*=", line):
            found.append((section + key[2], number))
    return found


def from_arguments(arguments: Sequence[str]) -> Settings:
    """`--optim.lr 0.05`, `--optim.lr=0.05`, or a bare `--flag` for true, as settings. Dashes in a name count as underscores.

    Raises:
        InputError: a word that is no option, an option without its value or given twice; all of them at once.
    """
    settings, errors, words = Settings(), [], list(arguments)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w", word):
            errors.append(f"command line: {word!r}: not an option; settings are given as --name value")
            continue
        name, equals, text = word[2:].partition("=")
        path = name.replace("-", "_")
        if not equals:
            if words and not re.match(r"--[a-zA-Z]", words[0]):
                text = words.pop(0)
            elif any(leaf.path == path and leaf.annotation is bool for leaf in leaves()):
                text = "true"
            else:
                errors.append(f"command line: --{path}: a value is missing; write --{path} VALUE")
                continue
        if path in settings.places:
            errors.append(f"command line: --{path}: given twice; remove one")
            continue
        _put(settings.values, path, _value(path, text))
        settings.places[path] = "command line"
    if errors:
        raise InputError(*errors)
    return settings


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
    if _takes_text(path):
        return text
    if text.lower() == "none":
        return None
    if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)  # `.05` and `5.`, which TOML does not know
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
