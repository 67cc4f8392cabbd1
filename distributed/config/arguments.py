"""Reads settings from command-line arguments. Imports no torch."""

import re
import tomllib
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

from distributed.config.hints import known, unknown
from distributed.config.layers import MAX_DEPTH, Settings, Tree, is_deep, settings_without_none, shown, text_settings
from distributed.config.leaves import leaves, table_around


def from_arguments(arguments: Sequence[str]) -> Settings:
    """Parse options into settings: `--optim.lr 0.05`, `--optim.lr=0.05`, or a bare `--flag` for true.

    Dashes in a name count as underscores. Stray arguments, repeated options and options without a value are added to
    the mistakes.
    """
    settings, remaining = Settings(), deque(arguments)
    while remaining:
        if mistake := _read_option(settings, remaining):
            settings.mistakes.append(f"command line: {mistake}")
    return settings


def _read_option(settings: Settings, remaining: deque[str]) -> str | None:
    """Move one option from the arguments to the settings; return what is wrong with it, if anything."""
    argument = remaining.popleft()
    if not re.match(r"--\w", argument):
        return f"{argument[:200]!r}: not an option; write settings as --name value"
    name, equals, text = argument[2:].partition("=")
    path = name.replace("-", "_")
    if not equals:
        if remaining and not re.match(r"--[a-zA-Z]", remaining[0]):
            text = remaining.popleft()
        elif path in _flags():
            text = "true"
        else:
            return f"--{shown(name)}: {_without_value(path)}"
    if path in settings.places:
        return f"--{shown(path)}: given twice; remove one"
    if other := _overlapping(path, settings):
        return f"--{shown(path)}: given together with --{shown(other)}; remove one"
    settings.places[path] = "command line"
    if path.count(".") >= MAX_DEPTH:
        return f"--{shown(path)}: {unknown(path)}"
    _put(settings.values, path, value_of(path, text))
    return None


@cache
def _flags() -> frozenset[str]:
    return frozenset(leaf.path for leaf in leaves() if bool in (leaf.annotation, *get_args(leaf.annotation)))


def _overlapping(path: str, settings: Settings) -> str | None:
    """Return an option that sets a value while `path` sets something in it, or the reverse.

    The time does not depend on the number of options unless there is one to return.
    """
    names = path.split(".")[: MAX_DEPTH + 1]
    outer = (".".join(names[:end]) for end in range(1, len(names)))
    if around := next((other for other in outer if other in settings.places), None):
        return around
    inside: Any = settings.values
    for name in names:
        inside = inside.get(name) if isinstance(inside, dict) else None
    if not inside:
        return None
    return next((other for other in settings.places if other.startswith(f"{path}.")), None)


def _without_value(path: str) -> str:
    """Return the error message for an option without a value."""
    if path in known() or table_around(path) or any(setting.startswith(f"{path}.") for setting in known()):
        return f"a value is missing; write --{path} VALUE"
    return unknown(path)


def _put(tree: Tree, path: str, value: Any) -> None:
    """Set a dotted path. No part of it may have a value yet."""
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def value_of(path: str, text: str) -> Any:
    """Return the text as TOML would read it (`0.05`, `true`, `[1, 2]`), None for `none`, else the text itself."""
    if text.lower() == "none" and path not in settings_without_none():
        return None
    if path in text_settings():
        return text
    if re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)  # `.05` and `5.`, which TOML does not accept
    try:
        document = tomllib.loads(f"value = {text}")
        tomllib.loads(f"value = [{text.rstrip()}]")  # fails on a comment, which would be dropped
    except (ValueError, RecursionError):
        return text
    value = document.pop("value")
    return text if document or is_deep(value) else value
