"""Batch norm with constants for statistics, so that what is left of a network must not depend on other samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distributed.models.torch_compat import AnyBatchNorm

_CHANGED = ("training", "momentum", "track_running_stats", "running_mean", "running_var", "num_batches_tracked")


@contextmanager
def recorded_statistics(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Record the statistics of batch norm layers in training mode; the yielded function makes them the constants to use.

    Untrained running statistics would not do: without normalization the activations of a deep network overflow. Context
    manager that restores the layers.
    """
    layers = [module for module in model.modules() if isinstance(module, AnyBatchNorm) and module.training]
    saved = [[getattr(layer, name) for name in _CHANGED] for layer in layers]

    def use() -> None:
        for layer in layers:
            layer.training = False

    try:
        for layer in layers:
            layer.momentum, layer.track_running_stats = None, True  # the average over all uses of the layer
            layer.running_mean, layer.running_var = torch.zeros(layer.num_features), torch.ones(layer.num_features)
            layer.num_batches_tracked = torch.tensor(0)
        yield use
    finally:
        for layer, values in zip(layers, saved, strict=True):
            for name, value in zip(_CHANGED, values, strict=True):
                setattr(layer, name, value)
