"""Finds the layers whose weights are needed only while they compute, so that their memory can be freed in between."""

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from distributed.exact.forward_trace import ModuleStack, tensors
from distributed.exact.sample_mixing import throwaway_batch
from distributed.exact.saved_model import unchanged
from distributed.models.keyed_dropout import use_sample_keys
from distributed.models.torch_compat import TorchDispatchMode

_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def layers_to_shard(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Return the paths of convolutions and linear layers that alone use their parameters, and their calls in one forward pass.

    A layer counts if it has the forward of `nn.Conv1d/2d/3d` or `nn.Linear`, if nothing outside this forward computes with
    its parameters, and if the backward pass does not call it again. Leaves the model unchanged, bit for bit.

    Args:
        model: float32 on the CPU; dropout layers are keyed.
        images: [n, 3, side, side], n at least 1; at most 3 are used.
    """
    images, keys = throwaway_batch(images)
    layers = {path: layer for path, layer in model.named_modules() if _has_plain_forward(layer)}
    stack = ModuleStack(model)
    calls, again = _Calls(), _Calls()
    with unchanged(model), torch.enable_grad():
        model.train()
        owners = _owners(model)
        with use_sample_keys(keys), stack.watched(calls), _Uses(stack, owners) as uses:
            output = model(images.clone())
        with use_sample_keys(keys), stack.watched(again):
            parameters = [p for p in model.parameters() if p.requires_grad]
            if output.requires_grad:
                torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    elsewhere = {path for storage, users in uses.users.items() for path in owners[storage] if users != {path}}
    elsewhere |= {path for paths in owners.values() if len(paths) > 1 for path in paths}
    return {
        path: calls.count[path]
        for path in layers
        if calls.count[path] and path not in elsewhere and not again.count[path]
    }


def _has_plain_forward(layer: nn.Module) -> bool:
    plain = any(type(layer).forward is cls.forward for cls in _TYPES) and "forward" not in vars(layer)
    return plain and any(True for _ in layer.parameters(recurse=False))


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Return the paths of the modules that register a parameter, by the address of its memory."""
    owners: dict[int, set[str]] = defaultdict(set)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                owners[parameter.untyped_storage().data_ptr()].add(path)
    return dict(owners)


class _Calls:
    """Counts the calls of each module."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def before(self, inside: str, module: nn.Module, path: str, inputs: list[Tensor]) -> None:
        self.count[path] += 1

    def after(self, module: nn.Module, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        pass


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which modules' forward an operation reads or writes the memory of a parameter."""

    def __init__(self, stack: ModuleStack, owners: dict[int, set[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.users: dict[int, set[str]] = defaultdict(set)
        self._stack, self._owners = stack, owners

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors([args, kwargs]):
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage().data_ptr()
                if storage in self._owners:
                    self.users[storage].add(self._stack.inside)
        return func(*args, **kwargs)
