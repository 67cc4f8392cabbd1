"""Finds the module of an import path without running it or a package that it is in. Imports no torch."""

import difflib
import hashlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

from distributed.errors import InputError

SCRIPT = "__main__"
"""Stands in an import path for the script or notebook that gave the object to `train`; it cannot be imported again."""

_GIVEN_AGAIN = {
    "model.name": "in Python, distributed.load(RUN, model=...) takes it",
    "data.name": "in Python, train(..., data=...) takes it",
    "loss.name": "in Python, train(..., loss=...) takes it",
}


class ModuleFile(NamedTuple):
    """The file of a module that a setting names, and its digest; both empty if the module has no file of its own."""

    file: str
    sha256: str


def module_files(import_paths: Mapping[str, str]) -> dict[str, ModuleFile]:
    """Return the file of each import path's module and its digest, by setting.

    Args:
        import_paths: e.g. {"model.name": "package.module:factory"}.

    Raises:
        InputError: there is no such module.
    """
    found = {}
    for setting, path in import_paths.items():
        found[setting] = ModuleFile("", "")
        with suppress(OSError):  # e.g. in a zip archive
            if file := check_module(path, setting):
                found[setting] = ModuleFile(str(file), hashlib.sha256(file.read_bytes()).hexdigest())
    return found


class ChangedModule(NamedTuple):
    """The file of a module, or its setting if it has none, and the first digits of its digests: recorded, and now."""

    name: str
    before: str
    now: str


def changed_modules(recorded: Any, now: Mapping[str, ModuleFile]) -> list[ChangedModule]:
    """Return the modules whose files differ from those that a checkpoint records.

    Args:
        recorded: as JSON; older versions recorded none.
        now: the result of `module_files`.
    """
    found = []
    for setting, module in now.items():
        saved = recorded.get(setting) if isinstance(recorded, dict) else None
        before = saved.get("sha256") if isinstance(saved, dict) else None
        if isinstance(before, str) and before != module.sha256:
            found.append(ChangedModule(module.file or setting, before[:12], module.sha256[:12]))
    return found


def check_module(path: str, setting: str) -> Path | None:
    """Check that the module of the import path `package.module:factory`, the value of a setting, exists.

    Args:
        setting: the setting that has the path, for the message.

    Returns:
        Its file; None if it is unknown.

    Raises:
        InputError: there is no such module; the message names a similar one if there is one.
    """
    module, _, factory = path.partition(":")
    if module == SCRIPT:
        if setting not in _GIVEN_AGAIN:
            raise InputError(
                f"{setting} = {path}: a function of a script or notebook cannot be imported; put it into a module of its own"
            )
        thing = {"model.name": "network"}.get(setting, setting.partition(".")[0])
        raise InputError(
            f"{setting} = {path}: this run's {thing} exists only in the script or notebook that trained it: "
            f"{_GIVEN_AGAIN[setting]}; commands find one that is in a module of its own"
        )
    spec: ModuleSpec | None = None
    for part in module.split("."):
        name = f"{spec.name}.{part}" if spec else part
        places = None if spec is None else spec.submodule_search_locations
        in_module = spec is not None and places is None  # rather than in a package
        found = None if in_module else _find(name, places)
        if found is None and _makes_its_modules(name):
            return None
        if spec and in_module:
            raise InputError(f"{setting} = {path}: {spec.name} is a module, not a package; write {spec.name}:{part}")
        if found is None:
            raise InputError(f"{setting} = {path}: there is no module {name}{_advice(name, factory, places)}")
        spec = found
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _find(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """Return the spec of a module in these folders, or of one outside any package."""
    with suppress(Exception):  # a finder of the user's, or a module without a spec
        if places is None:
            return importlib.util.find_spec(name)
        for finder in sys.meta_path:
            if spec := finder.find_spec(name, list(places)):
                return spec
    return None


def _makes_its_modules(name: str) -> bool:
    """Return whether a package makes a module that is in no folder. This imports the package, so it is asked last."""
    if name in sys.modules or "." not in name:
        return name in sys.modules
    try:
        return importlib.util.find_spec(name) is not None or name in sys.modules
    except ModuleNotFoundError as error:
        return name in sys.modules or error.name is None or not f"{name}.".startswith(f"{error.name}.")
    except (Exception, SystemExit):
        return True  # the import itself, later, says why


def _advice(name: str, factory: str, places: Sequence[str] | None) -> str:
    *package, last = name.split(".")
    names = {found.name for found in pkgutil.iter_modules(None if places is None else list(places))}
    if not package:
        names -= sys.stdlib_module_names
    close = difflib.get_close_matches(last, sorted(names), n=1, cutoff=0.7 if package else 0.8)
    meant = f"; did you mean {'.'.join([*package, close[0]])}?" if close else ""
    if not package:
        advice = f"run the command in the folder of {name}.py (this is {Path.cwd()}), or install the package"
        return f"{meant} Otherwise {advice}" if meant else f"; {advice}"
    return meant or f" in {next(iter(places or ()), 'its package')}; did you mean {'.'.join(package)}:{factory}?"
