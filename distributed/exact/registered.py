"""What a network registers that exact mode does not support, found without a forward pass."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from distributed.exact.reasons import Paths, Reason
from distributed.models.torch_compat import AnyBatchNorm, hooks_of, hooks_of_tensor, is_compiled

IN_FORWARD = "compute in forward what the hook computes"


def registered(model: nn.Module) -> list[Reason]:
    """Return the reasons that can be seen from the network's modules and parameters alone."""
    paths = Paths(model)
    found = []
    for path, module in model.named_modules():
        found += [paths.reason(path, problem, remedy) for problem, remedy in _of_module(module)]
    return found


def can_run(model: nn.Module) -> bool:
    """Whether a pass over the network can be observed: it is not compiled and knows its shapes."""
    return not any(is_compiled(module) or _lazy(module) for module in model.modules())


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is `BatchNorm1d/2d/3d`, or a subclass that computes the same."""
    forward = type(module).forward
    return isinstance(module, AnyBatchNorm) and forward is AnyBatchNorm.forward and "forward" not in vars(module)


def _of_module(module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, AnyBatchNorm) and not is_batch_norm(module):
        yield (
            "is a batch norm with a forward of its own, whose statistics cannot be synchronized",
            "use nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d, followed by a layer with the rest of its forward",
        )
    elif isinstance(module, AnyBatchNorm) and any(True for _ in module.children()):
        yield "is a batch norm with parametrized weights", "remove its parametrization"
    for name in _batch_norms_in_attributes(module):
        yield (
            f"refers to a batch norm by its attribute {name}, where it is not replaced by a synchronized one",
            "use nn.ModuleList, nn.ModuleDict or getattr(self, name)",
        )
    if is_compiled(module):
        yield "is compiled, so that no shard can pause in it", "remove torch.compile or .compile()"
    if _lazy(module):
        yield "has no shapes before its first forward", "pass the number of input features instead of a lazy layer"
        return  # its hook sets them
    for hook in hooks_of(module):
        yield _about_hook(hook)
    for name, parameter in module.named_parameters(recurse=False):
        if hooks_of_tensor(parameter):
            yield f"has a hook on its parameter {name}, which would not run", IN_FORWARD


def _batch_norms_in_attributes(module: nn.Module) -> Iterator[str]:
    """Yield the names of plain containers, e.g. a list, that hold a batch norm."""
    for name, value in vars(module).items():
        waiting = [value] if name != "_modules" else []
        while waiting:
            current = waiting.pop()
            if isinstance(current, AnyBatchNorm):
                yield name
                break
            if isinstance(current, dict):
                waiting += current.values()
            elif isinstance(current, list | tuple):
                waiting += current


def _about_hook(hook: Any) -> tuple[str, str]:
    name = type(hook).__name__
    if name in ("WeightNorm", "SpectralNorm"):
        function = "weight_norm" if name == "WeightNorm" else "spectral_norm"
        remedy = (
            "use torch.nn.utils.parametrizations.weight_norm"
            if name == "WeightNorm"
            else "remove it: spectral norm keeps state in forward"
        )
        return f"uses torch.nn.utils.{function}, a forward hook", remedy
    if hasattr(hook, "compute_mask"):  # torch.nn.utils.prune
        return "is pruned by a forward hook", "call torch.nn.utils.prune.remove for each of its pruned parameters"
    label = getattr(hook, "__qualname__", name).replace("<locals>.", "")
    return f"has the hook {label}, and hooks do not run in exact mode", IN_FORWARD


def _lazy(module: nn.Module) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(is_lazy(tensor) for tensor in tensors)
