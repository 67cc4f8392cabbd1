"""Whether a model can be computed shard by shard: only batch norm may look across the batch, nothing may draw or remember."""

from torch import nn


def check_exact(model: nn.Module) -> None:
    """Any other layer will do, parameters or not: each shard passes through it whole, and its gradients are summed.

    Raises:
        ValueError: a layer whose result depends on more than the shard, named, with the remedy.
    """
    reasons = [f"{name} ({type(m).__name__}) {reason}" for name, m in model.named_modules() if (reason := _reason(m))]
    if reasons:
        raise ValueError("exact mode, exact.shards > 0, cannot compute this model: " + "; ".join(reasons))


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return ""
    if isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return "draws from a generator, whose state depends on the processes; use KeyedDropout"
    own = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}
    remembered = [name for name in own if name not in module._non_persistent_buffers_set]
    if remembered:
        return f"keeps {remembered[0]} from batch to batch, and each shard would change it; constants should not be persistent"
    return ""
