"""Everything of a network that a forward pass may change: saved, compared and restored.

A deep copy would not do: some networks cannot be copied, and functions inside a copy may still refer to the original.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distributed.exact.generator_states import SavedGenerators, access
from distributed.models.torch_compat import AnyBatchNorm

# Set by batch norm's forward, or by `train`.
_OF_BATCH_NORM = {"running_mean", "running_var", "num_batches_tracked", "momentum", "track_running_stats"}
_OWN_PACKAGE = __name__.partition(".")[0]


@contextmanager
def unchanged(model: nn.Module) -> Iterator["SavedModel"]:
    """Restore the network and the global random generators afterwards, bit for bit. Context manager."""
    generators, saved = SavedGenerators(), SavedModel(model)
    try:
        yield saved
    finally:
        saved.restore()
        generators.restore()


@dataclass
class _Saved:
    """An object that can change, and its contents."""

    value: Any
    owner: str  # path of the module that holds it
    name: str
    contents: Any
    gradient: Tensor | None  # of a tensor; its bits are saved too


class SavedModel:
    """The tensors, attributes, containers, generators and gradients of a network's modules.

    Args:
        parameters: False leaves out the parameters, which are large.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = True) -> None:
        self._parameters = parameters
        self._paths = {id(module): path for path, module in model.named_modules()}
        packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
        self._packages = packages - {"torch", "builtins", _OWN_PACKAGE}
        self._batch_norms = {path for path, module in model.named_modules() if isinstance(module, AnyBatchNorm)}
        self._saved: dict[int, _Saved] = {}
        self._save(model)

    def changes(self) -> dict[str, list[str]]:
        """Return what differs from the saved state, except batch norm's: names of attributes by the path of their module."""
        found: dict[str, list[str]] = {}
        for saved in self._saved.values():
            for path, name in self._changes(saved):
                known = path in self._batch_norms and name in _OF_BATCH_NORM
                if not known and name not in found.setdefault(path, []):
                    found[path].append(name)
        return {path: names for path, names in found.items() if names}

    def drawn(self) -> list[tuple[str, str]]:
        """Return the network's own generators that were drawn from: (path of the module, description)."""
        saved = [entry for entry in self._saved.values() if isinstance(entry.contents, SavedGenerators)]
        return [
            (entry.owner, f"{name} in its attribute {entry.name}") for entry in saved for name in entry.contents.drawn()
        ]

    def restore(self) -> None:
        """Restore everything."""
        for saved in self._saved.values():
            _restore(saved)

    def _save(self, model: nn.Module) -> None:
        waiting: list[tuple[Any, str, str]] = [(model, "", "")]
        while waiting:
            value, owner, name = waiting.pop()
            owner = self._paths.get(id(value), owner)
            if id(value) not in self._saved and (contents := self._contents(value)) is not None:
                self._saved[id(value)] = _Saved(value, owner, name, contents, _gradient(value))
                waiting += [(part, owner, label) for part, label in reversed(list(_parts(value, contents, name)))]

    def _contents(self, value: Any) -> Any:
        """Return a copy of what can change in an object, or None if nothing can."""
        if isinstance(value, Tensor):
            left_out = isinstance(value, nn.Parameter) and not self._parameters
            return None if left_out else (value.data, value.data.clone())
        if isinstance(value, np.ndarray):
            return value.copy()
        if generator := access(value):
            return SavedGenerators([generator])
        if isinstance(value, list | dict | set | deque):
            return value.copy()
        if isinstance(value, tuple):
            return value
        if isinstance(value, nn.Module) or (
            type(value).__module__.partition(".")[0] in self._packages and not isinstance(value, type)
        ):
            return dict(vars(value)) if hasattr(value, "__dict__") else None
        return None

    def _changes(self, saved: _Saved) -> Iterator[tuple[str, str]]:
        value, contents = saved.value, saved.contents
        if isinstance(value, Tensor):
            if not same_bits(value.data, contents[1]):
                yield saved.owner, saved.name
        elif isinstance(value, np.ndarray):
            if not np.array_equal(value, contents):
                yield saved.owner, saved.name
        elif isinstance(contents, dict):
            now = value if isinstance(value, dict) else vars(value)
            for name in [*contents, *(key for key in now if key not in contents)]:
                missing = name not in contents or name not in now
                if name != "training" and (missing or not _same(contents[name], now[name])):
                    yield saved.owner, _label(value, saved.name, name)
        elif not isinstance(contents, SavedGenerators | tuple) and not _same(list(contents), list(value)):
            yield saved.owner, saved.name


def _parts(value: Any, contents: Any, name: str) -> Iterator[tuple[Any, str]]:
    """Yield the objects inside a saved one, each with the attribute that leads to it."""
    if isinstance(value, Tensor):
        if (gradient := _gradient(value)) is not None:
            yield gradient, f"{name}.grad"
    elif isinstance(value, np.ndarray) or isinstance(contents, SavedGenerators):
        return
    elif isinstance(contents, dict):
        yield from ((part, _label(value, name, key)) for key, part in contents.items())
    else:
        yield from ((part, name) for part in contents)


def _gradient(value: Any) -> Tensor | None:
    return value.grad if isinstance(value, Tensor) and value.is_leaf else None


def _label(value: Any, name: str, key: Any) -> str:
    """Return the name of an attribute, parameter or buffer; of something inside a container, the container's name."""
    registry = name in ("_parameters", "_buffers", "_modules")
    return str(key) if isinstance(value, nn.Module) or registry else name


@torch.no_grad()
def _restore(saved: _Saved) -> None:
    value, contents = saved.value, saved.contents
    if isinstance(value, Tensor):
        data, copy = contents
        if not same_bits(data, copy):
            data.copy_(copy)
        if value.layout != torch.strided or value.data_ptr() != data.data_ptr() or value.shape != data.shape:
            value.data = data
        if _gradient(value) is not saved.gradient:
            value.grad = saved.gradient
    elif isinstance(contents, SavedGenerators):
        contents.restore()
    elif isinstance(value, np.ndarray):
        value[...] = contents
    elif isinstance(contents, dict):
        now = value if isinstance(value, dict) else vars(value)
        if list(now) != list(contents) or any(now[key] is not contents[key] for key in contents):
            now.clear()
            now.update(contents)
    elif isinstance(value, list | deque):
        if len(value) != len(contents) or any(a is not b for a, b in zip(value, contents, strict=True)):
            value.clear()
            value.extend(contents)
    elif isinstance(value, set):
        value.clear()
        value.update(contents)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout or a.device != b.device:
        return False
    if a.layout != torch.strided or a.is_meta:
        return True
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _same(old: Any, new: Any) -> bool:
    """Whether an attribute has the same value. Objects that can change are compared by identity here, and by contents."""
    if old is new:
        return True
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return same_bits(old, new)
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return np.array_equal(old, new)
    if type(old) is not type(new):
        return False
    if isinstance(old, list | tuple | deque):
        return len(old) == len(new) and all(_same(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, nn.Module):
        return False
    try:
        return bool(old == new)
    except Exception:  # any type of the user's
        return False
