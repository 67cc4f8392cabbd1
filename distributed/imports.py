"""Imports what a setting names by import path, and describes the errors of a user's code. Imports no torch.

Every message begins with the setting and its value: `loss.name = net:focal: ...`.
"""

import difflib
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

from distributed.config.layers import shown
from distributed.errors import InputError


def imported(path: str, *, setting: str, purpose: str) -> Callable[..., Any]:
    """Return the function or class of the import path `package.module:function`.

    Args:
        setting: the setting that names it, e.g. `loss.name`.
        purpose: what it should do, for messages, e.g. `returns the network`.

    Raises:
        InputError: its module cannot be imported, or has no such function.
    """
    module_name, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(f"{setting} = {path}: {module_name} cannot be imported: {described(error)}") from error
    place = module_name
    for name in attributes.split("."):
        if not hasattr(found, name):
            public = [other for other in dir(found) if not other.startswith("_")]
            close = difflib.get_close_matches(name, public, n=1, cutoff=0.6)
            raise InputError(
                f"{setting} = {path}: {place} has no {name}; "
                + (f"did you mean {close[0]}?" if close else "name a function or class that is defined there")
            )
        found, place = getattr(found, name), f"{place}.{name}"
    if not callable(found):
        raise InputError(
            f"{setting} = {path}: {place} is of type {type(found).__name__}; name a function or class that {purpose}"
        )
    function: Callable[..., Any] = found
    return function


def check_signature(
    function: Callable[..., Any], path: str, *, setting: str, positional: Collection[str], options: Collection[str] = ()
) -> None:
    """Check that a function takes these arguments by position, and these options of `SECTION.options` by name.

    Args:
        setting: `SECTION.name`.

    Raises:
        InputError: its signature, if it has one, does not accept them.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # none is known, e.g. of a builtin
        return
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    start, count, called = f"{setting} = {path}", len(positional), ", ".join(positional)
    if len(by_position) < count and not takes_any:
        raise InputError(f"{start}: the function takes {len(by_position)} arguments; it is called with {called}")
    free = [
        p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in by_position[:count]
    ]
    table = f"{setting.rpartition('.')[0]}.options"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in options:
            if name not in (names := [p.name for p in free]):
                close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
                advice = f"did you mean {close[0]}?" if close else f"it accepts {', '.join(names) or 'none'}"
                raise InputError(f"{start}: the function does not accept {table}.{name}; {advice}")
    if missing := [p.name for p in free if p.default is p.empty and p.name not in options]:
        remedy = f"set {table}.{missing[0]}" if setting == "loss.name" else f"it is called with {called} only"
        raise InputError(f"{start}: the function needs the argument {missing[0]}; {remedy}")


def described(error: BaseException) -> str:
    """Return an error's type, message and last line outside torch."""
    text = " ".join(str(error).split())
    described = f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__
    if isinstance(error, SyntaxError):  # raised by the importer, about another file
        return f"{described} ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(_torch())] or frames
    return f"{described} ({own[-1].filename}:{own[-1].lineno})" if own else described


@cache
def _torch() -> Path:
    """Return torch's folder, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else Path("/nowhere")
