"""Copies of a model that share its weights and buffers, each with gradients of its own: one for each shard."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Whose weights autocast casts."""


class Replicas:
    """Parameters and buffers of all copies are the model's own memory: what is written there is seen by all.

    Args:
        low: what autocast would cast the weights of convolutions and linear layers to, once a copy; here it is done once
            for all, by `refresh`, and those weights' gradients come in this type.
        computed: what to compute with in place of parameters, by their ids; cast by others.
    """

    def __init__(
        self, model: nn.Module, copies: int, *, low: torch.dtype | None, computed: Mapping[int, Tensor] | None = None
    ) -> None:
        self.models = nn.ModuleList()
        cast = low is not None and computed is None
        self._wide: list[Tensor] = [p for p in model.parameters() if cast and _is_cast(model, p)]
        self._low: list[Tensor] = [p.detach().to(low) for p in self._wide]
        values = computed or dict(zip(map(id, self._wide), self._low, strict=True))
        for _ in range(copies):
            shared: dict[int, Tensor] = {
                id(p): nn.Parameter(values.get(id(p), p.detach()), p.requires_grad) for p in model.parameters()
            }
            shared |= {id(buffer): buffer for buffer in model.buffers()}
            self.models.append(copy.deepcopy(model, shared))
        self._fresh = True

    def weights_changed(self) -> None:
        """The model's weights were written to."""
        self._fresh = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Before a forward pass: cast what was changed."""
        if not self._fresh and self._low:
            torch._foreach_copy_(self._low, self._wide)
        self._fresh = True


def _is_cast(model: nn.Module, parameter: Tensor) -> bool:
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    return any(parameter is own for layer in layers for own in layer.parameters(recurse=False))
