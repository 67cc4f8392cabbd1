"""Small constant tensors that batch norm needs at every call.

On the CPU they are kept from one batch to the next, since making a small tensor takes as long as an operation on it. On CUDA
they are made anew: a CUDA graph fills what was made while it was captured only when it is replayed.
"""

from functools import lru_cache

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def is_plain_cpu(device: torch.device) -> bool:
    """Whether tensors are in host memory, and operations on them run at once instead of being traced by torch.compile."""
    return device == _CPU and not torch.compiler.is_compiling()


def filled(length: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of equal numbers, which must not be written to."""
    if is_plain_cpu(device):
        return _filled(length, value, dtype)
    return torch.full((length,), value, dtype=dtype, device=device)


def scratch(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector that kernels may write to and nobody reads."""
    return _scratch(length, dtype) if is_plain_cpu(device) else torch.empty(length, dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def _filled(length: int, value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((length,), value, dtype=dtype, device=_CPU)


@lru_cache(maxsize=1024)
def _scratch(length: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(length, dtype=dtype, device=_CPU)
