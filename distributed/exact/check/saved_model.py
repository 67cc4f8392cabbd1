"""Everything of a network that a forward pass may change: saved, compared and restored.

A deep copy would not do: some networks cannot be copied, and functions inside a copy may still refer to the original.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distributed.exact.bits import same_bits
from distributed.exact.check.throwaway import SavedGenerators
from distributed.models.torch_compat import AnyBatchNorm

_OF_BATCH_NORM = {"running_mean", "running_var", "num_batches_tracked", "momentum", "track_running_stats"}
_OWN_PACKAGE = __name__.partition(".")[0]
_CONTAINERS = (list, deque, set, bytearray, np.ndarray)


@contextmanager
def unchanged(model: nn.Module) -> Iterator["SavedModel"]:
    """Restore the network and the global random generators afterwards, bit for bit. Context manager."""
    generators, saved = SavedGenerators(), SavedModel(model)
    try:
        yield saved
    finally:
        saved.restore()
        generators.restore()


class _Saved(NamedTuple):
    """An object that can change."""

    value: Any
    path: str  # of the module that holds it
    name: str
    content: Any  # a copy; of a tensor, (its data, their copy, its gradient)


class SavedModel:
    """Tensors, gradients and attributes of a network's modules, also in lists, dictionaries and objects of its package."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
        self._packages = packages - {"torch", "builtins", _OWN_PACKAGE}
        self._batch_norms = {path for path, module in model.named_modules() if isinstance(module, AnyBatchNorm)}
        self._saved: dict[int, _Saved] = {}
        self._save(model, "", "")
        self._of_module: dict[str, list[_Saved]] = defaultdict(list)
        for saved in self._saved.values():
            if not isinstance(saved.value, Tensor | np.ndarray | bytearray):  # large
                self._of_module[saved.path].append(saved)

    def changes(self) -> dict[str, list[str]]:
        """Return what differs from the saved state, except batch norm's: names of attributes by the path of their module."""
        found: dict[str, list[str]] = {}
        for saved in self._saved.values():
            for name in self._unexpected(saved):
                if name not in found.get(saved.path, []):
                    found.setdefault(saved.path, []).append(name)
        return found

    def is_restored(self, path: str, name: str) -> bool:
        """Whether an attribute, as it is reached now, has its saved value: it may be another object."""
        module = next(value for value in (s.value for s in self._of_module[path]) if isinstance(value, nn.Module))
        before = self._saved[id(module)].content
        return name in before and name in vars(module) and self._equals_saved(before[name], vars(module)[name])

    def _equals_saved(self, old: Any, new: Any) -> bool:
        """Whether `new` has the value that `old` had when it was saved."""
        saved = self._saved.get(id(old))
        content = old if saved is None else saved.content[1] if isinstance(old, Tensor) else saved.content
        if isinstance(content, dict) and isinstance(new, dict):
            return content.keys() == new.keys() and all(self._equals_saved(content[key], new[key]) for key in content)
        if isinstance(content, list | tuple | deque) and type(content) is type(new):
            return len(content) == len(new) and all(map(self._equals_saved, content, new))
        return _same(content, new)

    def changed_attributes(self, path: str) -> Iterator[str]:
        """Yield what `changes` would return for one module, without comparing what is in its tensors."""
        for saved in self._of_module[path]:
            yield from self._unexpected(saved)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        for value, _, _, content in self._saved.values():
            if isinstance(value, Tensor):
                _restore_tensor(value, *content)
            elif isinstance(value, _CONTAINERS):
                if not _same(value, content):  # an array may be read-only
                    _refill(value, content)
            else:
                now = _attributes(value)
                if list(now) != list(content) or any(now[key] is not content[key] for key in content):
                    now.clear()
                    now.update(content)

    def _save(self, value: Any, path: str, name: str) -> None:
        path = self._paths.get(id(value), path)
        if id(value) in self._saved:
            return
        if isinstance(value, Tensor):
            gradient = value.grad if value.is_leaf else None
            self._saved[id(value)] = _Saved(value, path, name, (value.data, value.data.clone(), gradient))
            self._save(gradient, path, f"{name}.grad")
        elif isinstance(value, (tuple, *_CONTAINERS)):
            if not isinstance(value, tuple):
                self._saved[id(value)] = _Saved(value, path, name, copy.copy(value))
            for part in value if isinstance(value, list | tuple | deque) else ():
                self._save(part, path, name)
        elif isinstance(value, dict | nn.Module) or self._is_user_object(value):
            content = dict(_attributes(value))
            self._saved[id(value)] = _Saved(value, path, name, content)
            for key, part in content.items():
                self._save(part, path, _name(value, name, key))

    def _unexpected(self, saved: _Saved) -> Iterator[str]:
        statistics = _OF_BATCH_NORM if saved.path in self._batch_norms else set()
        return (name for name in _changed_names(saved) if name != "training" and name not in statistics)

    def _is_user_object(self, value: Any) -> bool:
        package = type(value).__module__.partition(".")[0]
        return package in self._packages and not isinstance(value, type) and hasattr(value, "__dict__")


def _attributes(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else vars(value)


def _name(value: Any, name: str, key: Any) -> str:
    """Return the name of an attribute, parameter or buffer; of something inside another object, that object's name."""
    own = isinstance(value, nn.Module) or name in ("_parameters", "_buffers", "_modules")
    return str(key) if own else name


def _changed_names(saved: _Saved) -> Iterator[str]:
    value, content = saved.value, saved.content
    if isinstance(value, Tensor):
        if not same_bits(value.data, content[1]):
            yield saved.name
    elif isinstance(value, _CONTAINERS):
        if not _same(value, content):
            yield saved.name
    else:
        now, are_parameters = _attributes(value), saved.name == "_parameters"
        for key in {**content, **now}:
            same = now.get(key) is content.get(key) if are_parameters else _same(content.get(key), now.get(key))
            if key not in content or key not in now or not same:
                yield _name(value, saved.name, key)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = content
    elif isinstance(value, list | bytearray):
        value[:] = content
    else:
        value.clear()
        fill = value.update if isinstance(value, set) else value.extend
        fill(content)


def _restore_tensor(value: Tensor, data: Tensor, copy: Tensor, gradient: Tensor | None) -> None:
    if not same_bits(data, copy):
        data.copy_(copy)
    if value.layout != torch.strided or value.data_ptr() != data.data_ptr() or value.shape != data.shape:
        value.data = data
    if value.is_leaf and value.grad is not gradient:
        value.grad = gradient


def _same(old: Any, new: Any) -> bool:
    """Whether an attribute has the same value. Changes inside the same object are found in its own content."""
    if old is new:
        return True
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return same_bits(old, new)
    if type(old) is not type(new):
        return False
    if isinstance(old, list | tuple | deque):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, np.ndarray):
        return (old.dtype, old.shape, old.tobytes()) == (new.dtype, new.shape, new.tobytes())
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    try:
        return bool(old == new)
    except Exception:  # of a class that we do not know
        return False
