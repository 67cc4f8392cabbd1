"""The copy of a model with which all shards of a rank compute."""

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from distributed.errors import InputError


class ComputeCopy:
    """A copy of a model; its parameters and buffers are the model's own memory, so writes to it reach the copy.

    Args:
        low: the dtype to which autocast would cast the weights of `cast_layers` once per shard. Here `refresh` casts them once
            for all shards, and their gradients have this dtype.
        cast_layers: names of the layers whose parameters no other code uses.
        gathered: tensors to compute with instead of the parameters, by the parameters' ids; the caller casts them.

    Raises:
        InputError: copy.deepcopy gives a module other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        low: torch.dtype | None,
        cast_layers: Collection[str],
        gathered: Mapping[int, Tensor] | None = None,
    ) -> None:
        cast = cast_layers if low is not None and gathered is None else ()
        self._wide: list[Tensor] = [p for name in cast for p in model.get_submodule(name).parameters(recurse=False)]
        self._low: list[Tensor] = [p.detach().to(low) for p in self._wide]
        values = gathered or dict(zip(map(id, self._wide), self._low, strict=True))
        shared: dict[int, Tensor] = {
            id(p): nn.Parameter(values.get(id(p), p.detach()), p.requires_grad) for p in model.parameters()
        }
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        self.model = copy.deepcopy(model, shared)
        kept = set(map(id, shared.values()))
        if own := [name for name, p in self.model.named_parameters() if id(p) not in kept]:
            raise InputError(
                f"exact.shards > 0: a copy of the network does not share its {own[0]}, because a module has a __deepcopy__ of "
                "its own, or is a ScriptModule: remove that, or set exact.shards = 0"
            )
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
