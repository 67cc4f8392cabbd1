"""torch's private names for layers, as read from torch 2.14.1.

tests/unit/test_torch_internals.py fails if the installed torch lacks one of them, or one of the undocumented kernels that
models, engines and optimizers call.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "AnyBatchNorm",
    "AnyDropout",
    "NormBase",
    "TorchDispatchMode",
    "hooks_of",
    "hooks_of_tensor",
    "is_compiled",
]


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks that are registered for the forward and backward pass of a module."""
    tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for table in tables for hook in table.values()]


def hooks_of_tensor(tensor: Tensor) -> list[Any]:
    """Return the hooks that are registered for the gradient of a tensor."""
    tables = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return [hook for table in tables if table for hook in table.values()]


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to a module."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
