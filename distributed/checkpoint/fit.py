"""Compares the names and shapes of a network's tensors with those of weights to start from."""

import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.errors import first_few
from distributed.run.weights_file import as_literal

_SHOWN = 3
_COUNTER = ".num_batches_tracked"  # of batch norms; files of old torch versions do not have it


class Fit(NamedTuple):
    """How weights fit a network."""

    names: list[str]
    """The tensors to load."""
    resized_layer: str | None
    """The layer with another number of classes, which keeps its own tensors; "" is the network itself."""
    misfits: dict[str, list[str]]
    """By kind, the names of tensors for which the weights cannot be loaded, with their shapes; empty if they can."""


def fit_weights(own: Mapping[str, Tensor], found: Mapping[str, Tensor], *, ignored: Collection[str] = ()) -> Fit:
    """Compare a network's parameters and persistent buffers with the tensors found.

    Args:
        own: of a `state_dict`, so tied tensors share memory; one of their names is enough.
        ignored: names that may be found but are not loaded: of buffers that the network computes itself.
    """
    in_memory = {_memory(tensor) for name, tensor in own.items() if name in found and _is_all_of_its_memory(tensor)}
    missing = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in own.items()
        if name not in found and _memory(tensor) not in in_memory and not name.endswith(_COUNTER)
    ]
    unexpected = [f"{name} {list(t.shape)}" for name, t in found.items() if name not in own and name not in ignored]
    both = [name for name in own if name in found]
    other_type = [f"{name} {found[name].dtype}" for name in both if _kind(own[name]) != _kind(found[name])]
    other_shape = [name for name in both if own[name].shape != found[name].shape]
    layers = {name.rpartition(".")[0] for name in other_shape}
    is_resized = len(layers) == 1 and all(_differs_in_rows(own[name], found[name]) for name in other_shape)
    shapes = [f"{name} {list(found[name].shape)}, here {list(own[name].shape)}" for name in other_shape]
    misfits = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": [] if is_resized else shapes,
        "of another type": other_type,
    }
    return Fit(
        [name for name in both if name not in other_shape],
        layers.pop() if is_resized else None,
        {kind: names for kind, names in misfits.items() if names},
    )


def explained(fit: Fit, own: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, *, model_name: str) -> str:
    """Describe the misfits in one line: the count and the first names of each kind, and what would make them fit."""
    kinds = "; ".join(f"{len(names)} {kind}: {first_few(names, _SHOWN)}" for kind, names in fit.misfits.items())
    return f"does not fit model.name = {model_name}: {kinds}; {_remedy(own, found, path)}"


def _remedy(own: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> str:
    load = f"s.load_file({as_literal(str(path))})"
    for prefix in _prefixes(found):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        if len(stripped) == len(found) and not fit_weights(own, stripped).misfits:
            return f"without the prefix {prefix} the names fit; {_rename(f'k.removeprefix({as_literal(prefix)})', load, path)}"
    for prefix in _prefixes(own):
        if not fit_weights(own, {prefix + name: tensor for name, tensor in found.items()}).misfits:
            return f"with the prefix {prefix} the names fit; {_rename(f'{as_literal(prefix)} + k', load, path)}"
    return "name weights of the same network"


def _rename(new_name: str, load: str, path: Path) -> str:
    target = as_literal(str(path.with_name(f"renamed-{path.name}")))
    code = f"import safetensors.torch as s; s.save_file({{{new_name}: v for k, v in {load}.items()}}, {target})"
    return f"rename them: python -c {shlex.quote(code)}"


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes that end with a dot and that all names have, shortest first."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return [".".join(common[: length + 1]) + "." for length in range(len(common))]


def _differs_in_rows(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ in size, but in the first dimension only."""
    return one.dim() == other.dim() > 0 and len(one) != len(other) and one.shape[1:] == other.shape[1:]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_all_of_its_memory(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "integer"
