"""Replicas of a model, one per shard, that share weights and buffers but have their own gradients."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose weights autocast casts."""


class Replicas:
    """Replicas of a model; their parameters and buffers are the model's own memory, so writes to it reach all of them.

    Args:
        low: the dtype to which autocast would cast the weights of convolutions and linear layers, once per replica. Here
            `refresh` casts them once for all replicas, and their gradients have this dtype.
        gathered: tensors to compute with instead of the parameters, by the parameters' ids; the caller casts them.
    """

    def __init__(
        self, model: nn.Module, count: int, *, low: torch.dtype | None, gathered: Mapping[int, Tensor] | None = None
    ) -> None:
        self.models = nn.ModuleList()
        cast = low is not None and gathered is None
        self._wide: list[Tensor] = [p for p in model.parameters() if cast and _is_cast(model, p)]
        self._low: list[Tensor] = [p.detach().to(low) for p in self._wide]
        values = gathered or dict(zip(map(id, self._wide), self._low, strict=True))
        for _ in range(count):
            shared: dict[int, Tensor] = {
                id(p): nn.Parameter(values.get(id(p), p.detach()), p.requires_grad) for p in model.parameters()
            }
            shared |= {id(buffer): buffer for buffer in model.buffers()}
            self.models.append(copy.deepcopy(model, shared))
        self._stale = False

    def mark_stale(self) -> None:
        """Record that the model's weights have changed."""
        self._stale = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights again if they have changed. Call before a forward pass."""
        if self._stale and self._low:
            torch._foreach_copy_(self._low, self._wide)
        self._stale = False


def _is_cast(model: nn.Module, parameter: Tensor) -> bool:
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    return any(parameter is own for layer in layers for own in layer.parameters(recurse=False))
