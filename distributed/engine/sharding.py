"""Tensors under canonical names, whole or in parts on the ranks: put together to be saved, cut to be loaded."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor


class Placement(Protocol):
    """How one tensor lies on the ranks."""

    shape: torch.Size
    """Of all parts together."""

    def whole(self, part: Tensor) -> Tensor:
        """All ranks' parts as one plain tensor; a collective."""
        ...

    def cut(self, whole: Tensor) -> Tensor:
        """What of the whole tensor is this rank's."""
        ...


class LocalTensor(NamedTuple):
    """A tensor of this rank, a plain one, and what it is a part of."""

    part: Tensor
    place: Placement


class Replicated:
    """On every rank alike."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def whole(self, part: Tensor) -> Tensor:
        return part

    def cut(self, whole: Tensor) -> Tensor:
        return whole


class FlatShard:
    """A run of the tensor's numbers, in the order of its indices, that begins at `start`; no number on two ranks."""

    def __init__(self, shape: torch.Size, start: int, length: int) -> None:
        self.shape, self._own = shape, slice(start, start + length)

    def whole(self, part: Tensor) -> Tensor:
        numbers = part.new_zeros(self.shape.numel())
        numbers[self._own] = part
        # Summed as integers: 0.0 added to -0.0 is 0.0, another number by its bits.
        dist.all_reduce(numbers.view(torch.int32))
        return numbers.view(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1)[self._own]


FOREIGN = {
    "compression.": "error feedback of PowerSGD, which this version does not have",
    "scaler.": "float16's loss scale",
}
"""What only some engines and precisions go on from, by how its names begin."""


@torch.no_grad()
def load(held: Mapping[str, LocalTensor], tensors: Mapping[str, Tensor], *, apart: str = "") -> None:
    """Copy whole tensors in. What the optimizer keeps and is not given becomes zero and averages become the weights, as
    at the start. What only another engine or precision goes on from is left out, and told.

    Args:
        apart: how names begin that are loaded by others.

    Raises:
        ValueError: a tensor of the model is missing, has another shape, or one is left over.
    """
    tensors = _without_foreign(tensors, apart=apart)
    wrong = [
        f"{name}: here {tuple(place.shape)}, there {tuple(tensors[name].shape) if name in tensors else 'nothing'}"
        for name, (_, place) in held.items()
        if (name not in tensors and name.startswith("model."))
        or (name in tensors and tensors[name].shape != place.shape)
    ]
    wrong += [f"{name}: not known here" for name in tensors if name not in held]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
        raise ValueError("the checkpoint does not fit the model: " + "; ".join(wrong[:3]) + more)
    for name, (part, place) in held.items():
        kind, _, rest = name.partition(".")
        source = f"model.{rest}" if kind == "ema" and name not in tensors else name
        if source in tensors:
            part.copy_(place.cut(tensors[source]))
        else:
            part.zero_()


def _without_foreign(tensors: Mapping[str, Tensor], *, apart: str) -> dict[str, Tensor]:
    found = dict(tensors)
    for prefix, what in FOREIGN.items():
        kept = {name: tensor for name, tensor in found.items() if not name.startswith(prefix)}
        if len(kept) < len(found) and prefix != apart:
            logger.info("the checkpoint's {} tensors {}* are not needed here: {}", len(found) - len(kept), prefix, what)
        found = kept
    return found
