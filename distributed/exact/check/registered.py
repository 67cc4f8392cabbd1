"""What a network registers that exact mode does not support, found without a forward pass."""

from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from distributed.exact.check.problems import Problem
from distributed.models.plain_batch_norm import why_unsupported
from distributed.models.torch_compat import AnyBatchNorm, hooks_of, hooks_of_tensor, is_compiled

INSTEAD_OF_HOOK = "compute in forward what the hook computes"


def registered(model: nn.Module) -> list[Problem]:
    """Return the problems that can be seen from the network's modules and parameters alone."""
    own = set(map(id, model.modules()))
    return [
        Problem(path, what, remedy)
        for path, module in model.named_modules()
        for what, remedy in _of_module(module, own)
    ]


def can_run(model: nn.Module) -> bool:
    """Whether passes over the network can be watched: it is not compiled, and its parameters have shapes."""
    return not any(is_compiled(module) or _is_lazy(module) for module in model.modules())


def _of_module(module: nn.Module, own: set[int]) -> Iterator[tuple[str, str]]:
    """Yield (problem, remedy) of a module without its children; `own` has the ids of the network's modules."""
    if is_compiled(module):
        yield "is compiled, so that no shard can pause in it", "remove torch.compile or .compile()"
    if _is_lazy(module):
        yield "has no shapes before its first forward", "pass the number of input features instead of a lazy layer"
        return  # its hook sets them
    if isinstance(module, nn.RReLU):  # draws for negative inputs only, so a pass may miss it
        yield "draws from torch's generator, which depends on the number of processes", "use nn.LeakyReLU"
    if isinstance(module, AnyBatchNorm) and (problem := why_unsupported(module)):
        yield problem
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and any(_holds(cell, own) for cell in value.__closure__ or ()):
            refers = f"has a function {name} that refers to a module of the network"
            yield f"{refers}: in exact mode's copy it would still use the original", "make it a method"
    for hook in hooks_of(module):
        yield _of_hook(hook)
    for name, parameter in module.named_parameters(recurse=False):
        if hooks_of_tensor(parameter):
            yield f"has a hook on its parameter {name}, which would not run", INSTEAD_OF_HOOK


def _of_hook(hook: Any) -> tuple[str, str]:
    name = type(hook).__name__
    if name == "WeightNorm":
        return "uses torch.nn.utils.weight_norm, a hook", "use torch.nn.utils.parametrizations.weight_norm"
    if name == "SpectralNorm":
        return "uses torch.nn.utils.spectral_norm, a hook", "remove it, because spectral norm keeps state in forward"
    if hasattr(hook, "compute_mask"):  # torch.nn.utils.prune
        return "is pruned by a hook", "call torch.nn.utils.prune.remove for each of its pruned parameters"
    return f"has the hook {getattr(hook, '__qualname__', name)}, which would not run", INSTEAD_OF_HOOK


def _holds(cell: CellType, own: set[int]) -> bool:
    try:
        held = cell.cell_contents
    except ValueError:  # empty
        return False
    return isinstance(held, nn.Module) and any(id(module) in own for module in held.modules())


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)])
