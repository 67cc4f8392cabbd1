"""Imports and calls functions that settings name by their import path; every failure is one line. Imports no torch."""

import copy
import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed.config.layers import shown
from distributed.errors import InputError
from distributed.host.importable import check_module


@dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A function or class outside this package.

    Attributes:
        setting: the setting that names it, e.g. `model.name`.
        path: its import path, `package.module:function`.
        noun: what messages call it, e.g. `factory`.
        result: what it returns, e.g. `the network`.
        options: the keyword arguments that the config sets.
        options_in: the table of the config that holds them, e.g. `model.options`.
        given: the keyword arguments that it always gets, each with a remedy if it does not accept them.
        positional: what it gets by position.
    """

    setting: str
    path: str
    noun: str
    result: str
    options: Mapping[str, Any] = field(default_factory=dict)
    options_in: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    positional: Sequence[str] = ()

    def error(self, reason: str) -> InputError:
        """Return an error whose message begins with the setting and its value."""
        return InputError(f"{self.setting} = {self.path}: {reason}")

    def load(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """Import the function and check that it accepts its arguments.

        Args:
            function: the function itself, if Python code gave it; nothing is imported then.

        Raises:
            InputError: the module cannot be imported, has no such function, or the function takes other arguments.
        """
        if function is None:
            check_module(self.path, self.setting)
            function = self._imported()
        self._check_arguments(function)
        return function

    def call(self, function: Callable[..., Any], **given: Any) -> Any:
        """Call the loaded function with the arguments of `given` and the options, and return its result.

        Raises:
            InputError: the function raised an exception.
        """
        try:
            return function(**given, **copy.deepcopy(dict(self.options)))
        except (Exception, SystemExit) as error:
            raise self.error(self._failed_call(error)) from error

    def _imported(self) -> Callable[..., Any]:
        module_name, _, attributes = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise self.error(f"{module_name} cannot be imported: {described(error)}") from error
        place = module_name
        for name in attributes.split("."):
            try:
                is_there = hasattr(found, name)
            except (Exception, SystemExit) as error:  # of a package that imports its parts when they are first used
                raise self.error(f"{place}.{name} cannot be imported: {described(error)}") from error
            if not is_there:
                public = [other for other in dir(found) if not other.startswith("_")]
                close = difflib.get_close_matches(name, public, n=1, cutoff=0.6)
                advice = f"did you mean {close[0]}?" if close else "name a function or class that is defined there"
                raise self.error(f"{place} has no {name}; {advice}")
            found, place = getattr(found, name), f"{place}.{name}"
        if not callable(found):
            raise self.error(
                f"{place} is of type {type(found).__name__}; name a function or class that returns {self.result}"
            )
        function: Callable[..., Any] = found
        return function

    def _check_arguments(self, function: Callable[..., Any]) -> None:
        """Raise InputError if the function's signature does not accept its arguments."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # none is known, e.g. of a builtin
            return
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(by_position) < len(self.positional) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise self.error(f"the {self.noun} should accept {' and '.join(self.positional)} by position")
        named = {
            p.name: p.default is p.empty
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in by_position[: len(self.positional)]
        }
        passed = (*self.given, *self.options)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            for name in passed:
                if name not in named:
                    raise self.error(self._not_accepted(name, list(named)))
        if missing := [name for name, is_required in named.items() if is_required and name not in passed]:
            remedy = (
                f"set {self.options_in}.{missing[0]}"
                if self.options_in
                else f"use functools.partial to set {missing[0]}"
            )
            raise self.error(f"the {self.noun} needs the argument {missing[0]}; {remedy}")

    def _not_accepted(self, name: str, accepted: list[str]) -> str:
        if name in self.given:
            return f"the {self.noun} does not accept {name}, {self.given[name]}"
        others = [other for other in accepted if other not in self.given]
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
        advice = f"did you mean {close[0]}?" if close else f"it accepts {', '.join(others) or 'none'}"
        return f"the {self.noun} does not accept {self.options_in}.{name}; {advice}"

    def _failed_call(self, error: BaseException) -> str:
        """Say why the call failed; an argument that the function passed on may be the reason."""
        is_type_error = isinstance(error, TypeError)
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if is_type_error else None
        if unexpected and unexpected[1] in (*self.given, *self.options):
            reason = self._not_accepted(unexpected[1], [])
            return f"{reason.partition(';')[0]}: {described(error)}"
        return f"the {self.noun} failed: {described(error)}"


def described(error: BaseException) -> str:
    """Return an error's type, message and last line outside torch."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__
    if isinstance(error, SyntaxError):  # raised by the importer, about another file
        return f"{line} ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if not frame.filename.startswith("<")]
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    own = [frame for frame in frames if not (torch and Path(frame.filename).is_relative_to(Path(torch).parent))]
    own = own or frames
    return f"{line} ({own[-1].filename}:{own[-1].lineno})" if own else line


def type_name(value: Any) -> str:
    """Return how messages call a value of a wrong type."""
    return "None" if value is None else f"an object of type {type(value).__name__}"
