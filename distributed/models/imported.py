"""Builds a network by the import path of its factory, and checks the modules and tensors that the factory returns."""

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distributed import rng
from distributed.config.models import ImportedModel
from distributed.config.user_code import UserFunction, described, type_name
from distributed.errors import InputError

GivenModel = nn.Module | Callable[..., nn.Module]
"""A network that Python code gives instead of an import path: the function or class that builds it, or the module itself."""

_NO_CLASSES = "the number of classes of the data; name a function that does, e.g. one of your own that calls it"


def build_imported(config: ImportedModel, *, num_classes: int, seed: int, given: GivenModel | None = None) -> nn.Module:
    """Call the config's factory once, on the CPU in float32; its draws depend on the seed alone.

    The generators of torch, Python and NumPy are restored afterwards.

    Args:
        given: a factory to call instead of importing one, or a module to copy.

    Raises:
        InputError: the factory cannot be imported or called, or does not return a network that can be trained.
    """
    if isinstance(given, nn.Module):
        if config.options:
            raise InputError("model.options has no effect on a module that train() was given already built: remove it")
        _check_network(given, config.name)
        return _in_training(copied(given, config.name))
    factory = UserFunction(
        setting="model.name",
        path=config.name,
        noun="factory",
        result="the network",
        options=config.options,
        options_in="" if given and not config.options else "model.options",
        given={"num_classes": _NO_CLASSES},
    )
    with seeded(seed, "model"):
        model: nn.Module = factory.call(factory.load(given), num_classes=num_classes)
    _check_network(model, config.name)
    if given is not None:  # it may have returned a module that exists already, e.g. of a notebook
        model = copied(model, config.name)
    return _in_training(model)


def _in_training(model: nn.Module) -> nn.Module:
    _make_dense(model)
    model.train()  # which may return nothing
    return model


def _make_dense(model: nn.Module) -> None:
    """Give each parameter contiguous memory of its own: some are views into others, or in channels-last memory.

    Engines flatten and shard parameters, and lay them out themselves. Buffers become contiguous too: the elements of an
    expanded one share memory, so a checkpoint could not be loaded into it.
    """
    for parameter in model.parameters():
        storage = parameter.untyped_storage()  # NumPy's cannot be freed, as sharded weights are
        if not parameter.is_contiguous() or storage.nbytes() != parameter.nbytes or not storage.resizable():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    dense: dict[int, Tensor] = {}  # buffers that modules share stay shared
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_contiguous():
                module._buffers[name] = dense.setdefault(id(buffer), buffer.contiguous())


def copied(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of a network. Raises InputError if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
        if any(type(hook).__name__ == "WeightNorm" for hook in hooks):
            raise InputError(
                f"model.name = {name}: torch.nn.utils.weight_norm keeps a network from being copied; use "
                "torch.nn.utils.parametrizations.weight_norm"
            ) from error
        raise InputError(
            f"model.name = {name}: the network cannot be copied, but exact mode and its check need copies: {described(error)}"
        ) from error


def generator_states() -> tuple[bytes, ...]:
    """Return the states of the generators of torch on the CPU, of Python and of NumPy."""
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seed the generators of torch, Python and NumPy from (seed, purpose); restore them and torch's defaults at the end."""
    first, second = rng.key_words(seed, purpose)
    of_python, of_numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    threads = torch.get_num_threads()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(first << 32 | second)
            random.seed(first << 32 | second)
            np.random.seed([first, second])
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(1)  # the bits of e.g. nn.init.orthogonal_ depend on it
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _check_network(model: Any, name: str) -> None:
    """Raise InputError unless a factory has returned a module that can be trained."""
    setting = f"model.name = {name}"
    if not isinstance(model, nn.Module):
        raise InputError(f"{setting}: the factory returned {type_name(model)}; it should return a torch.nn.Module")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [path for path, tensor in tensors if is_lazy(tensor)]:
        raise InputError(
            f"{setting}: {lazy[0]} has no size before the first forward pass; give the lazy layers their sizes, or call the "
            "network once before returning it"
        )
    for path, tensor in tensors:
        if tensor.device.type != "cpu":
            raise InputError(
                f"{setting}: {path} is on {tensor.device}; leave all tensors on the CPU, and `device` sets the rest"
            )
        if tensor.layout != torch.strided:
            raise InputError(
                f"{setting}: {path} is {tensor.layout}, which checkpoints cannot hold; store it dense, or its indices and "
                "values as buffers"
            )
    for path, buffer in model.named_buffers():
        if buffer.is_complex():
            raise InputError(
                f"{setting}: {path} is complex, and `precision` would drop its imaginary part; store torch.view_as_real of it"
            )
    for path, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise InputError(
                f"{setting}: {path} is {parameter.dtype}; parameters should be torch.float32, and `precision` sets the rest"
            )
    if overlap := _overlapping(model):
        first, second = overlap
        raise InputError(
            f"{setting}: {second} is another parameter in the memory of {first}, which would not stay tied; assign the "
            "parameter itself, without nn.Parameter(...), or copy it: .clone()"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{setting}: the network has no parameters that require gradients; there is nothing to train")
    _check_state(model, setting)


def _overlapping(model: nn.Module) -> tuple[str, str] | None:
    """Return the names of two different parameters that have elements in common, if any do."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for path, parameter in model.named_parameters():
        by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((path, parameter))
    for sharing in by_storage.values():
        if len(sharing) == 1:
            continue
        owners = torch.full((sharing[0][1].untyped_storage().nbytes() // 4,), -1)  # all are float32
        for index, (path, tensor) in enumerate(sharing):
            own = owners.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            if own.numel() and (other := int(own.max())) >= 0:
                return sharing[other][0], path
            own.fill_(index)
    return None


def _check_state(model: nn.Module, setting: str) -> None:
    """Raise InputError unless a network's state_dict has its tensors themselves."""
    state = model.state_dict()
    if other := [path for path, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"{setting}: state_dict() has {other[0]}, which is not a tensor, so it would not be saved; make it a buffer"
        )
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path not in state or state[path].data_ptr() != parameter.data_ptr():
            raise InputError(
                f"{setting}: state_dict() does not return the parameter {path} itself, so training would not be saved; leave "
                "state_dict as torch.nn.Module has it"
            )
