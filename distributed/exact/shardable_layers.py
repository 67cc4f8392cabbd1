"""Finds the layers whose weights are needed only while they compute, so that their memory can be freed in between."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distributed.exact.check.module_stack import ModuleStack, tensors
from distributed.exact.check.registered import can_run
from distributed.exact.check.saved_model import unchanged
from distributed.exact.check.throwaway import throwaway_batch
from distributed.models.imported import seeded
from distributed.models.keyed_dropout import use_sample_keys
from distributed.models.torch_compat import AnyBatchNorm, TorchDispatchMode

_DEVICE_TYPES = ("cpu", "cuda")
_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def layers_to_shard(model: nn.Module, images: Tensor, conditional: Collection[str] = ()) -> dict[str, int]:
    """Return the paths of convolutions and linear layers whose parameters nothing else uses, and their calls in a forward pass.

    A layer counts if it has the forward of `nn.Conv1d/2d/3d` or `nn.Linear`, if nothing outside this forward computes with
    its parameters, if the backward pass does not call it again, if evaluation does not call it more often than training, if
    every batch calls it, and if autocast is never off around a call: such a layer computes in float32. Leaves the model
    unchanged, bit for bit.

    Args:
        model: float32 on the CPU; dropout layers are keyed.
        images: [n, 3, side, side], n at least 1; at most 3 are used.
        conditional: the result of `conditional_modules`.
    """
    images, keys = throwaway_batch(images)
    layers = [path for path, layer in model.named_modules() if _has_plain_forward(layer)]
    calls: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}  # by whether it is training
    recomputed, wide = set[str](), set[str]()

    def before(_: nn.Module, path: str, inputs: Any) -> None:
        calls[model.training].update([path])
        if not all(map(torch.is_autocast_enabled, _DEVICE_TYPES)):
            wide.add(path)

    with unchanged(model), use_sample_keys(keys), _autocast_to_float32():
        stack = ModuleStack(model, before=before)
        with stack, _Uses(model, stack) as uses:
            for training in (False, True):
                model.train(training)
                with torch.set_grad_enabled(training):
                    output = model(images.clone())
        with ModuleStack(model, before=lambda _, path, inputs: recomputed.add(path)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            if output.requires_grad:
                torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    excluded = recomputed | wide | uses.shared_or_used_elsewhere() | set(calls[False] - calls[True]) | {*conditional}
    return {path: calls[True][path] for path in layers if calls[True][path] and path not in excluded}


@contextmanager
def _autocast_to_float32() -> Iterator[None]:
    """Turn autocast on, but to float32, so that it has no effect but code that turns it off is noticed. Context manager."""
    before = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICE_TYPES]
    try:
        for device in _DEVICE_TYPES:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.float32)
        with warnings.catch_warnings():
            for message in ("In .* autocast, but the target dtype is not supported", "CUDA is not available"):
                warnings.filterwarnings("ignore", message)  # of torch.utils.checkpoint
            yield
    finally:
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def conditional_modules(model: nn.Module, images: Tensor) -> set[str]:
    """Return the paths of modules with parameters, and of batch norms, that only some images use, e.g. experts.

    Each image is tried alone, and a batch of none, which calls no module that waits for an image of its own. Leaves the model
    unchanged, bit for bit.

    Args:
        model, images: as for `layers_to_shard`.
    """
    images, keys = throwaway_batch(images)
    own = {path for path, module in model.named_modules() if _has_state(module)}
    found: set[str] = set()
    if not can_run(model):
        return found
    with unchanged(model), seeded(0, "conditional"), torch.no_grad():  # all ranks draw the same
        for training in (False, True):
            model.train(training)
            parts = [(images[part], keys[part]) for part in (slice(3), slice(1), slice(1, 2), slice(2, 3), slice(0))]
            called = [paths for part in parts if (paths := _called(model, *part)) is not None]
            found |= set[str]().union(*called) - set[str].intersection(*called) if called else set()
    return found & own


def _has_state(module: nn.Module) -> bool:
    return isinstance(module, AnyBatchNorm) or any(True for _ in module.parameters(recurse=False))


def _called(model: nn.Module, images: Tensor, keys: Tensor) -> set[str] | None:
    """Return the paths of the modules that these images use; None if the model does not accept so few."""
    paths: set[str] = set()
    with ModuleStack(model, before=lambda _, path, inputs: paths.add(path)), use_sample_keys(keys):
        try:
            model(images.clone())
        except Exception:  # e.g. batch norm in training, with one value per channel
            return None
    return paths


def _has_plain_forward(layer: nn.Module) -> bool:
    plain = any(type(layer).forward is cls.forward for cls in _TYPES) and "forward" not in vars(layer)
    return plain and any(True for _ in layer.parameters(recurse=False))


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which modules' forward an operation reads or writes the memory of a parameter."""

    def __init__(self, model: nn.Module, stack: ModuleStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stack = stack
        self._owners: dict[int, set[str]] = defaultdict(set)  # paths, by the address of a parameter's memory
        self._users: dict[int, set[str]] = defaultdict(set)
        for path, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                if parameter.numel():
                    self._owners[parameter.untyped_storage().data_ptr()].add(path)

    def shared_or_used_elsewhere(self) -> set[str]:
        """Return the paths of modules whose parameters also belong to others, or that others have computed with."""
        found = [paths for key, paths in self._owners.items() if len(paths) > 1 or self._users[key] - paths]
        return set().union(*found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors([args, kwargs]):
            if tensor.layout == torch.strided:
                address = tensor.untyped_storage().data_ptr()
                if address in self._owners:
                    self._users[address].add(self._stack.inside)
        return func(*args, **kwargs)
