"""Arguments of `train`: their types, and how the config names an object that takes the place of a section. Imports no torch."""

import functools
import inspect
import keyword
import sys
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from distributed.config.data import ImportedData
from distributed.config.layers import Settings, shown
from distributed.config.networks import is_import_path
from distributed.config.train_config import TrainConfig
from distributed.config.validate import validated
from distributed.errors import InputError
from distributed.host.importable import SCRIPT


def import_path_of(given: object) -> str:
    """Return the import path of a function or class; `__main__:NAME` if importing it elsewhere would not give it.

    That is so for everything defined in a script or notebook, for functions inside functions, and for other objects.
    """
    module, qualified = getattr(given, "__module__", None), getattr(given, "__qualname__", None)
    if (inspect.isclass(given) or inspect.isroutine(given)) and module != SCRIPT:
        path = f"{module}:{qualified}"
        if is_import_path(path) and _is_at(given, str(module), str(qualified)):
            return path
    while isinstance(given, functools.partial):
        given = given.func
    name = getattr(given, "__name__", None) or type(given).__name__
    is_name = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    path = f"{SCRIPT}:{name if is_name else 'function'}"
    return path if is_import_path(path) else f"{SCRIPT}:function"


def _is_at(given: object, module: str, qualified: str) -> bool:
    try:
        found: Any = attrgetter(qualified)(sys.modules[module])
    except (AttributeError, KeyError):
        return False
    return bool(found == given)


def with_given(config: TrainConfig, *, model: object = None, data: object = None, loss: object = None) -> TrainConfig:
    """Return the config with each given object's import path in place of the section that it replaces.

    A section that names the object keeps its other settings. Settings that all data have are kept in any case.

    Raises:
        InputError: an object of the wrong type, or settings that do not fit it.
    """
    values: dict[str, Any] = {}
    if model is not None:
        check_model(model, "train()")
        path = import_path_of(model)
        values["model"] = config.model.model_dump() if config.model.name == path else {"name": path}
    if data is not None:
        if not isinstance(data, Mapping):
            raise InputError(f"train(): data is of type {type(data).__name__}: should be a dict of four NumPy arrays")
        kept = ImportedData.model_fields.keys() - {"name", "options"}
        section = {name: value for name, value in config.data.model_dump().items() if name in kept}
        values["data"] = section | {"name": f"{SCRIPT}:data"}
    if loss is not None:
        if not callable(loss):
            raise InputError(
                f"train(): loss is of type {type(loss).__name__}: should be a function of logits and targets"
            )
        path = import_path_of(loss)
        values["loss"] = config.loss.model_dump() if config.loss.name == path else {"name": path}
    return validated(Settings(config.model_dump() | values)) if values else config


def check_model(model: object, where: str) -> None:
    """Raise InputError unless `model`, an argument of the function `where`, can be a network or the factory of one."""
    if callable(model):
        return
    wrong = f"model = {shown(model)}" if isinstance(model, str) else f"model is of type {type(model).__name__}"
    named = "; a network by import path is a setting: load_config(..., model={'name': 'package.module:factory'})"
    raise InputError(
        f"{where}: {wrong}: should be a function or class called as model(num_classes=N), or a torch.nn.Module"
        f"{named if isinstance(model, str) else ''}"
    )


def check_arguments(config: object, *, stop: object, sinks: object) -> None:
    """Raise InputError if an argument of `train` is of the wrong type."""
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"train(): config is of type {type(config).__name__}: should be a TrainConfig, e.g. of load_config"
        )
    if config.scaling:
        raise InputError(
            f"train(): scaling.num_workers = {config.scaling.num_workers}: scaling is for python -m launch.ray_train; leave "
            "that section out"
        )
    if stop is not None and not _has(stop, "requested"):
        raise InputError(
            f"train(): stop is of type {type(stop).__name__}: should be an object with a method requested()"
        )
    if not isinstance(sinks, list | tuple):
        raise InputError(f"train(): sinks is of type {type(sinks).__name__}: should be a list of sinks")
    for sink in sinks:
        if missing := [name for name in ("log_step", "log_epoch", "close") if not _has(sink, name)]:
            raise InputError(
                f"train(): sinks has an object of type {type(sink).__name__}: should have the methods log_step, log_epoch and "
                f"close; it lacks {' and '.join(missing)}"
            )


def _has(thing: object, method: str) -> bool:
    return not inspect.isclass(thing) and callable(getattr(thing, method, None))
