"""Checks that a model can be computed shard by shard: only batch norm may depend on other samples of the batch."""

from torch import nn

from distributed.models.torch_compat import AnyBatchNorm, AnyDropout, is_persistent


def check_exact(model: nn.Module) -> None:
    """Check every layer of the model.

    Raises:
        ValueError: the result of a layer depends on more than its shard; names each such layer and the remedy.
    """
    reasons = [f"{name} ({type(m).__name__}) {reason}" for name, m in model.named_modules() if (reason := _reason(m))]
    if reasons:
        raise ValueError("exact.shards > 0: exact mode does not support this model: " + "; ".join(reasons))


def _reason(module: nn.Module) -> str:
    if isinstance(module, AnyBatchNorm):
        return ""
    if isinstance(module, AnyDropout | nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return "draws from a random generator, whose state depends on the processes; use KeyedDropout"
    buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}
    persistent = [name for name in buffers if is_persistent(module, name)]
    if persistent:
        return (
            f"has the persistent buffer {persistent[0]}, which every shard would change; register it with "
            "persistent=False if it is constant"
        )
    return ""
