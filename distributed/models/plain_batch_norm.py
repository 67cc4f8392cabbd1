"""Names the batch norms of a model that a synchronized one cannot replace, since they are more than torch's own."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from distributed.models.torch_compat import AnyBatchNorm

# What decides how a layer computes. With torch.nn.utils.parametrize, weight and bias are properties of its class.
_DECISIVE = ("forward", "__call__", "train", "eval", "weight", "bias")


def unsupported_batch_norms(model: nn.Module) -> list[str]:
    """Return a message for each layer, with its name, the reason and the remedy."""
    return [
        f"{name or 'the model'} ({type(layer).__name__}) {reason}"
        for name, layer in model.named_modules()
        if isinstance(layer, AnyBatchNorm) and (reason := _reason(layer))
    ]


def _reason(layer: AnyBatchNorm) -> str:
    if isinstance(layer, LazyModuleMixin):
        return "does not know its number of channels yet; run a forward pass where the network is made"
    base = nn.SyncBatchNorm if isinstance(layer, nn.SyncBatchNorm) else AnyBatchNorm
    for name in _DECISIVE:
        if getattr(type(layer), name, None) is not getattr(base, name, None) or name in vars(layer):
            return (
                f"is a batch norm with its own {name}, which a synchronized one would drop; use nn.BatchNorm1d, 2d or 3d, "
                "and do the rest in a layer after it"
            )
    return ""
