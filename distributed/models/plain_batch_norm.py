"""The batch norms of a model as its author made them: which of them a synchronized one cannot replace, and why."""

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from distributed.models.torch_compat import AnyBatchNorm

_DECISIVE = ("forward", "__call__", "train", "eval", "weight", "bias")  # what decides how a layer computes


class LocalBatchNorm(AnyBatchNorm):
    """`nn.SyncBatchNorm` without communication: batch norm of inputs with any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


def make_batch_norm_local(model: nn.Module) -> None:
    """Make every `nn.SyncBatchNorm` of the model a batch norm without communication, in place.

    torch's layer rejects CPU tensors once there is a process group. The engines synchronize every batch norm themselves.
    """
    for layer in model.modules():
        if type(layer) is nn.SyncBatchNorm:
            layer.__class__ = LocalBatchNorm  # type: ignore[assignment]


def unsupported_batch_norms(model: nn.Module) -> list[str]:
    """Return a message for each layer, with its name, the problem and the remedy."""
    return [
        f"{name or 'the model'} ({type(layer).__name__}) {'; '.join(problem)}"
        for name, layer in model.named_modules()
        if isinstance(layer, AnyBatchNorm) and (problem := why_unsupported(layer))
    ]


def why_unsupported(layer: AnyBatchNorm) -> tuple[str, str] | None:
    """Return the problem and its remedy, or None if a synchronized batch norm can replace the layer."""
    if isinstance(layer, LazyModuleMixin):
        return "does not know its number of channels yet", "run a forward pass where the network is made"
    if any(True for _ in layer.children()):
        return "is a batch norm with parametrized weights", "remove its parametrization"
    base = nn.SyncBatchNorm if isinstance(layer, nn.SyncBatchNorm) else AnyBatchNorm
    for name in _DECISIVE:
        if getattr(type(layer), name, None) is not getattr(base, name, None) or name in vars(layer):
            return (
                f"is a batch norm with its own {name}, which a synchronized one would drop",
                "use nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d, and do the rest in a layer after it",
            )
    return None
