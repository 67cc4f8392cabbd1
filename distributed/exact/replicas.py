"""Copies of a model that share its weights and buffers, each with gradients of its own: one for each shard."""

import copy

from torch import Tensor, nn


def replicate(model: nn.Module, copies: int) -> list[nn.Module]:
    """The parameters' values and the buffers are the model's own memory: what is written there is seen by all."""
    replicas = []
    for _ in range(copies):
        shared: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        replicas.append(copy.deepcopy(model, shared))
    return replicas
