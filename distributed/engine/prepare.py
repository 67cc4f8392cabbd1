"""How an engine computes, and the preparation of a model that engines share."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from distributed.comm.all_gather import open_all_gather
from distributed.comm.collectives import world_size
from distributed.models.fused_batch_norm import synchronize_batch_norm
from distributed.models.grad_checkpointing import checkpoint_blocks


@dataclass(frozen=True)
class Compute:
    """Precision, memory layout and device of an engine.

    Args:
        precision: one of config.precision.
        channels_last: keep weights in channels-last memory, if the engine supports it.
        timeout_seconds: how long to wait for another rank.
        checkpointed: names of the modules that are recomputed in the backward pass, in fast mode.
    """

    precision: str
    channels_last: bool
    device: torch.device
    timeout_seconds: float
    checkpointed: tuple[str, ...] = ()

    @property
    def low_dtype(self) -> torch.dtype | None:
        """The dtype to which autocast casts; None without autocast."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision)

    def autocast(self, *, cache: bool = True) -> AbstractContextManager[None]:
        """Run a forward pass in this precision. Context manager.

        Args:
            cache: cast a weight only once, even if it is used several times.
        """
        if self.low_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.low_dtype, cache_enabled=cache)


def cast(model: nn.Module, compute: Compute) -> nn.Module:
    """Move the model to its device, dtype and memory layout, and return it."""
    dtype = torch.float64 if compute.precision == "float64" else torch.float32
    model = model.to(compute.device, dtype)
    for tensor in chain(model.parameters(), model.buffers()) if compute.channels_last else ():
        if tensor.dim() == 4:  # Module.to fails on tensors of five dimensions, e.g. the weight of a Conv3d
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def prepare(model: nn.Module, compute: Compute) -> nn.Module:
    """Cast the model and, with several ranks, synchronize its batch norm: for fast mode. A collective."""
    model = cast(model, compute)
    if world_size() > 1:
        gather = open_all_gather(compute.device, timeout_seconds=compute.timeout_seconds)
        synchronize_batch_norm(model, gather)
    checkpoint_blocks(model, compute.checkpointed)
    return model
