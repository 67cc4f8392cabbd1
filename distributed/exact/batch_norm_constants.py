"""Batch norm with given constants, so that what is left of a network must not depend on other samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distributed.models.torch_compat import AnyBatchNorm

_CHANGED = ("training", "momentum", "track_running_stats")


class BatchNormConstants:
    """The batch norm layers of a network in training mode. They record the statistics of throwaway passes, then use them.

    Untrained running statistics would not do: without normalization the activations of a deep network overflow.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, AnyBatchNorm) and m.training]

    def record(self) -> None:
        """Normalize by the statistics of the batch and record their averages over all uses of a layer."""
        for layer in self._layers:
            layer.training, layer.momentum, layer.track_running_stats = True, None, True
            layer.running_mean.zero_()
            layer.running_var.fill_(1)
            layer.num_batches_tracked.zero_()

    def use(self) -> None:
        """Normalize by the recorded constants."""
        for layer in self._layers:
            layer.training = False

    @contextmanager
    def recording(self) -> Iterator["BatchNormConstants"]:
        """Record, with tensors that replace the running statistics. Context manager that restores the layers."""
        saved = [(layer, dict(layer._buffers), [getattr(layer, name) for name in _CHANGED]) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.running_mean = torch.zeros(layer.num_features)
                layer.running_var = torch.ones(layer.num_features)
                layer.num_batches_tracked = torch.tensor(0)
            self.record()
            yield self
        finally:
            for layer, buffers, values in saved:
                for name, buffer in buffers.items():
                    setattr(layer, name, buffer)
                for name, value in zip(_CHANGED, values, strict=True):
                    setattr(layer, name, value)
