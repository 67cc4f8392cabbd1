"""A checkpoint's tensors: written tensor by tensor, with a digest, so that nothing is held twice in memory.

The library's own writer wants all bytes at once and gives no digest; reading is the library's.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distributed.files import Written

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write CPU tensors of any layout; on the disk when this returns."""
    with path.open("wb") as file:
        digest = hashlib.blake2b(digest_size=16)
        size = 0
        for chunk in (_header(tensors), *(_bytes_of(tensor) for tensor in tensors.values())):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; a ValueError where their file is none."""
    try:
        return load_file(checkpoint / "tensors.safetensors")
    except SafetensorError as error:
        raise ValueError(f"tensors.safetensors: {error}") from None


def digest_of_tensor(tensor: Tensor) -> str:
    """Of its numbers in row-major order, whatever its layout."""
    return hashlib.blake2b(_bytes_of(tensor), digest_size=8).hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Any:
    """The tensor's bytes in row-major order, as a buffer over its own memory where it lies so already."""
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
