"""Replaces batch norm's statistics by constants; the rest of a network must not depend on other samples."""

import torch
from torch import nn

from distributed.models.torch_compat import AnyBatchNorm


def record_statistics(model: nn.Module) -> list[nn.Module]:
    """Let batch norm layers in training mode record the statistics of the next passes; return these layers.

    Untrained running statistics would not do as constants: without normalization the activations of a deep network overflow.
    Replaces the layers' running statistics and settings; the caller restores them.
    """
    layers = [module for module in model.modules() if isinstance(module, AnyBatchNorm) and module.training]
    for layer in layers:
        layer.momentum, layer.track_running_stats = None, True  # the average over all uses of the layer
        layer.running_mean, layer.running_var = torch.zeros(layer.num_features), torch.ones(layer.num_features)
        layer.num_batches_tracked = torch.tensor(0)
    return list(layers)


def has_statistics(layer: AnyBatchNorm) -> bool:
    """Whether a pass has updated the statistics that the layer records."""
    return any(t is not None and bool(t.any()) for t in (layer.num_batches_tracked, layer.running_mean))


def use_recorded(layers: list[nn.Module]) -> None:
    """Normalize by the recorded statistics from now on. The caller restores the layers."""
    for layer in layers:
        layer.training = False
