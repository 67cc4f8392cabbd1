"""Comparison of tensors by their bits."""

import hashlib
from collections.abc import Hashable

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals itself."""
    if (a.dtype, a.shape, a.layout, a.device) != (b.dtype, b.shape, b.layout, b.device):
        return False
    return a.layout != torch.strided or torch.equal(_integers(a), _integers(b))


def digest(tensor: Tensor) -> Hashable:
    """Return a value that is equal for tensors that `same_bits` calls equal, and no others."""
    described = (tensor.dtype, tensor.shape, tensor.layout, tensor.device)
    if tensor.layout != torch.strided:
        return described
    return *described, hashlib.blake2b(_integers(tensor).cpu().numpy().data, digest_size=16).digest()


def _integers(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
