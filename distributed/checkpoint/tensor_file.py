"""A checkpoint's tensors in safetensors format, written one tensor at a time so that at most one is copied in memory.

The library's own writer needs all bytes at once and computes no digest. Its reader is used unchanged.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distributed.files import Written
from distributed.run.checkpoint_layout import TENSORS

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write CPU tensors of any memory layout and flush them to disk."""
    with path.open("wb") as file:
        digest = hashlib.blake2b(digest_size=16)
        size = 0
        for chunk in chain([_header(tensors)], map(_bytes_of, tensors.values())):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint. Raises ValueError if its file is not in safetensors format."""
    try:
        return load_file(checkpoint / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{TENSORS}: {error}") from None


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of the values in row-major order, independent of the memory layout."""
    return hashlib.blake2b(_bytes_of(tensor), digest_size=8).hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to eight bytes
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes in row-major order, as a buffer over the tensor's own memory if it is contiguous."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
