"""Tensors under canonical names, replicated or sharded over ranks: gathered to be saved, split to be loaded."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor


class Placement(Protocol):
    """How one tensor is distributed over the ranks."""

    shape: torch.Size
    """Shape of the full tensor."""

    def gather(self, local: Tensor) -> Tensor:
        """Return the full tensor from every rank's local part; a collective."""
        ...

    def local_part(self, full: Tensor) -> Tensor:
        """Return this rank's part of the full tensor."""
        ...


class LocalTensor(NamedTuple):
    """This rank's part of a tensor, itself a plain tensor, and how the full tensor is placed."""

    local: Tensor
    placement: Placement


class Replicated:
    """Every rank has the full tensor: a `Placement`."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def gather(self, local: Tensor) -> Tensor:
        return local

    def local_part(self, full: Tensor) -> Tensor:
        return full


class FlatShard:
    """This rank has elements `start` to `start + length` of the flattened tensor: a `Placement`. Shards do not overlap."""

    def __init__(self, shape: torch.Size, start: int, length: int) -> None:
        self.shape, self.length, self._range = shape, length, slice(start, start + length)

    def gather(self, local: Tensor) -> Tensor:
        full = local.new_zeros(self.shape.numel())
        full[self._range] = local
        # Summed as integers, since -0.0 + 0.0 is 0.0, which has other bits than -0.0.
        dist.all_reduce(full.view(torch.int32))
        return full.view(self.shape)

    def local_part(self, full: Tensor) -> Tensor:
        return full.reshape(-1)[self._range]


OPTIONAL_TENSORS = {"scaler.": "float16's loss scale"}
"""Name prefixes of tensors that only some engines or precisions need to resume, with a description."""


@torch.no_grad()
def load(
    local_tensors: Mapping[str, LocalTensor], tensors: Mapping[str, Tensor], *, loaded_by_caller: str = ""
) -> None:
    """Copy full tensors into this rank's local tensors.

    Optimizer tensors that are missing become zero, and a missing EMA becomes the weights, as at the start of training. Tensors
    that only another engine or precision needs are ignored with a log line.

    Args:
        loaded_by_caller: a name prefix of tensors that the caller loads.

    Raises:
        ValueError: a tensor of the model is missing or of another shape, or a tensor is unknown.
    """
    tensors = _without_optional(tensors, loaded_by_caller=loaded_by_caller)
    _check_fit(local_tensors, tensors)
    for name, (local, placement) in local_tensors.items():
        kind, _, rest = name.partition(".")
        source = f"model.{rest}" if kind == "ema" and name not in tensors else name
        if source in tensors:
            local.copy_(placement.local_part(tensors[source]))
        else:
            local.zero_()


def _check_fit(local_tensors: Mapping[str, LocalTensor], tensors: Mapping[str, Tensor]) -> None:
    misfits = []
    for name, (_, placement) in local_tensors.items():
        expected = tuple(placement.shape)
        if name in tensors and tensors[name].shape != placement.shape:
            misfits.append(f"{name} has shape {tuple(tensors[name].shape)}, the model needs {expected}")
        elif name not in tensors and name.startswith("model."):
            misfits.append(f"{name} {expected} is missing")
    misfits += [f"{name} is unknown" for name in tensors if name not in local_tensors]
    if misfits:
        more = f"; and {len(misfits) - 3} more" if misfits[3:] else ""
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(misfits[:3]) + more)


def _without_optional(tensors: Mapping[str, Tensor], *, loaded_by_caller: str) -> dict[str, Tensor]:
    remaining = dict(tensors)
    for prefix, description in OPTIONAL_TENSORS.items():
        kept = {name: tensor for name, tensor in remaining.items() if not name.startswith(prefix)}
        ignored = len(remaining) - len(kept)
        if ignored and prefix != loaded_by_caller:
            logger.info(
                "checkpoint: ignoring {} tensors {}* ({}), which this run does not use", ignored, prefix, description
            )
        remaining = kept
    return remaining
