"""Reads settings from TOML files, which may extend one another. Imports no torch."""

import os
import re
import tomllib
from pathlib import Path

from distributed.config.layers import MAX_DEPTH, Settings, Tree, dotted_paths, is_deep, settings_without_none, shown
from distributed.config.named import config_file
from distributed.errors import InputError
from distributed.files import read_at_most, with_home

_MAX_BYTES = 2**20  # a config with every setting has about 5,000
_MAX_CHAIN = 32  # files that extend each other


def from_file(path: Path, *, extended_by: tuple[str, ...] = ()) -> Settings:
    """Return the settings of a TOML file over those of the file that its `extends` names (beside it, or a shipped one).

    Raises:
        InputError: no such file, not TOML, or a file that extends itself.
    """
    here, name = os.path.realpath(path), shown(path)  # not resolve(), which raises if links form a circle
    if here in extended_by:
        raise InputError(f"{name}: extends leads back to this file; remove one `extends`")
    if len(extended_by) >= _MAX_CHAIN:
        raise InputError(f"{name}: `extends` chain of more than {_MAX_CHAIN} files; merge some of them")
    text, values = _parsed(path, name, extended_by)
    base = values.pop("extends", None)
    lines = _lines_of_keys(text)
    settings = Settings()
    if base is not None:
        if not isinstance(base, str) or not base or "\0" in base:
            raise InputError(f"{name}: extends = {shown(base)}: must be the name of one file, in quotes")
        settings = from_file(config_file(with_home(base), beside=path.parent), extended_by=(*extended_by, here))
    places = dict.fromkeys(dotted_paths(values), name) | {key: f"{name}:{line}" for key, line in lines.items()}
    settings.override(Settings(_with_none(values), places))
    return settings


def _parsed(path: Path, name: str, extended_by: tuple[str, ...]) -> tuple[str, Tree]:
    """Return the text of a TOML file and its parsed content."""
    try:
        text = read_at_most(path, _MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        remedy = (
            f"correct `extends` in {shown(extended_by[-1])}" if extended_by else "the first argument names a TOML file"
        )
        raise InputError(f"config file {name}: {reason}; {remedy}") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for a number with thousands of digits
        raise InputError(f"{name}: not valid TOML: {error}; correct that line, or name another file") from None
    if is_deep(values):
        raise InputError(
            f"{name}: sections or values are nested more than {MAX_DEPTH} deep, but no setting is; remove them"
        )
    return text, values


def _with_none(tree: Tree, prefix: str = "") -> Tree:
    """Replace the word none by None, which TOML lacks, except in settings where it is text."""
    result: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            result[key] = _with_none(value, f"{path}.")
        else:
            result[key] = None if value == "none" and path not in settings_without_none() else value
    return result


def _lines_of_keys(text: str) -> dict[str, int]:
    """Return dotted path -> line number for each key of a TOML text; approximate, for messages only."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(r"\s*\[\[?([\w.\"-]+)\]", line):
            section = header[1].replace('"', "") + "."
            found[section[:-1]] = number
        elif key := re.match(r"\s*(\"?)([\w.-]+)\1\s*=", line):
            found[section + key[2]] = number
    return found
