"""Configs by name: `cifar10` and `seeds/I-10` are files that ship with the package, found from any folder."""

import difflib
import os
import re
from pathlib import Path

from distributed.errors import InputError
from distributed.host.shipped import shipped


def names() -> dict[str, Path]:
    """Return the shipped configs by their names, which have no suffix."""
    folder = shipped("configs")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.toml"))}


def config_file(name_or_path: str, *, beside: Path = Path()) -> Path:
    """Return the file that a first argument or `extends` refers to: a path, or the name of a shipped config.

    A file of exactly that name in the folder `beside` takes precedence; a name that ends in .toml is always a path.

    Raises:
        InputError: it looks like a name, and neither a file nor a shipped config has it.
    """
    path = beside / name_or_path
    if os.path.isfile(path) or len(name_or_path) > 200 or not re.fullmatch(r"[\w.+/-]+", name_or_path):
        return path
    known = names()
    if name_or_path in known:
        return known[name_or_path]
    if os.path.lexists(path):
        return path
    name = name_or_path.removesuffix(".toml").removeprefix("configs/")
    if name in known:
        raise InputError(f"config file {path}: no such file; did you mean the shipped config {name}?")
    if path.suffix != ".toml":
        raise InputError(
            f"config {name_or_path}: no such file, and no config of this name ships with the package"
            f"{_nearest(name, known)}; choose one of {', '.join(known)}, or name a TOML file"
        )
    return path


def _nearest(name: str, known: dict[str, Path]) -> str:
    by_last_name = {shipped_name.rpartition("/")[2].lower(): shipped_name for shipped_name in known}
    found = difflib.get_close_matches(name.rpartition("/")[2].lower(), by_last_name, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(by_last_name[last] for last in found)}?)" if found else ""
