"""Builds the sinks that `logging.sinks` names by import path, and guards training against them."""

import difflib
import importlib
import traceback
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig
from distributed.config.layers import shown
from distributed.errors import InputError
from distributed.metrics.installed import check_installed
from distributed.metrics.records import Sink
from distributed.metrics.sinks import OptionalSink
from distributed.metrics.wandb_sink import check_credentials

_METHODS = ("log_step", "log_epoch", "close")


def open_sinks(config: TrainConfig) -> list[Sink]:
    """Build the sinks of `logging.sinks`, each as Class(config=config, run_dir=run_dir). Called on rank 0.

    Once training runs, the first error of one is a warning, and it is not called again.

    Raises:
        InputError: one cannot be imported or built or lacks a method, or a package or key for the other sinks is missing.
    """
    check_installed(config.logging)
    if config.logging.wandb:
        check_credentials(config.logging.wandb)
    return [_guarded(path, _built(path, config)) for path in config.logging.sinks]


def _guarded(path: str, sink: Sink) -> OptionalSink:
    return OptionalSink(path, lambda: sink)


def _built(path: str, config: TrainConfig) -> Sink:
    made = import_object(path, setting="logging.sinks", wanted="a class with log_step, log_epoch and close")
    try:
        sink: Sink = made(config=config, run_dir=config.run_dir)
    except (Exception, SystemExit) as error:
        raise InputError(f"logging.sinks = {path}: {path} failed: {described(error)}") from error
    if missing := [name for name in _METHODS if not callable(getattr(sink, name, None))]:
        raise InputError(
            f"logging.sinks = {path}: {type(sink).__name__} has no method {missing[0]}; a sink has {', '.join(_METHODS)}"
        )
    return sink


def import_object(path: str, *, setting: str, wanted: str) -> Any:
    """Return what an import path names, which should be callable.

    Args:
        setting: the setting that has the path, for the message.
        wanted: what it should name, for the message.

    Raises:
        InputError: it cannot be imported, has no such attribute, or is not callable.
    """
    module, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{setting} = {path}: {module} cannot be imported: {described(error)}") from error
    place = module
    for name in attributes.split("."):
        if not hasattr(found, name):
            public = [other for other in dir(found) if not other.startswith("_")]
            close = difflib.get_close_matches(name, public, n=1, cutoff=0.6)
            advice = f"did you mean {close[0]}?" if close else f"name {wanted}"
            raise InputError(f"{setting} = {path}: {place} has no {name}; {advice}")
        found, place = getattr(found, name), f"{place}.{name}"
    if not callable(found):
        raise InputError(f"{setting} = {path}: {place} is of type {type(found).__name__}; name {wanted}")
    return found


def described(error: BaseException) -> str:
    """Return an error's type, message and the last line of code that it passed through."""
    text = " ".join(str(error).split())
    told = f"{type(error).__name__}: {shown(text)}" if text else type(error).__name__
    if isinstance(error, SyntaxError):  # raised by the importer, about another file
        return f"{told} ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<")]
    frames = [f for f in frames if Path(f.filename) != Path(importlib.__file__ or "")]
    return f"{told} ({frames[-1].filename}:{frames[-1].lineno})" if frames else told
