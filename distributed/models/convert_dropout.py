"""Replaces the dropout layers of a network by keyed ones, from outside."""

from collections.abc import Callable
from typing import Any

from torch import nn

from distributed.errors import InputError
from distributed.models.keyed_dropout import KeyedAlphaDropout, KeyedDropout
from distributed.models.torch_compat import hooks_of

Convert = Callable[[Any, dict[str, Any]], KeyedDropout]


def convert_dropout(model: nn.Module) -> nn.Module:
    """Replace torch's dropout layers, torchvision's StochasticDepth and timm's DropPath; return the model.

    A layer's masks are keyed by its path in the model. A layer that is registered at several paths stays one layer. One
    with a forward of its own or with hooks is not replaced.

    Raises:
        InputError: names each layer with one draw for the entire batch, which is not the same on other numbers of ranks.
    """
    keyed = {layer: new for path, layer in model.named_modules() if (new := _keyed(path, layer))}
    refused = [
        f"{path}: StochasticDepth with mode = 'batch' draws once for the entire batch, but batches depend on the number of "
        "processes; use mode = 'row'"
        for path, layer in model.named_modules()
        if layer in keyed and getattr(layer, "mode", "row") == "batch" and layer.p
    ]
    if refused:
        raise InputError(*refused)
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if path and layer in keyed:
            model.set_submodule(path, keyed[layer])
    return keyed.get(model, model)


def _keyed(path: str, layer: nn.Module) -> KeyedDropout | None:
    bases: tuple[Any, ...] = type(layer).__mro__
    for cls in bases:
        convert = _KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if convert:
            if type(layer).forward is not cls.forward or "forward" in vars(layer) or hooks_of(layer):
                return None
            return convert(layer, {"name": path, "replaces": cls.__name__}).train(layer.training)
    return None


def _dropout(layer: Any, options: dict[str, Any]) -> KeyedDropout:
    return KeyedDropout(layer.p, inplace=layer.inplace, **options)


def _channels(dims: int | None) -> Convert:
    """Convert a layer that drops channels. Its batched input has `dims` dimensions: with one less, torch adds one."""

    def convert(layer: Any, options: dict[str, Any]) -> KeyedDropout:
        return KeyedDropout(layer.p, inplace=layer.inplace, per="channel", dims=dims, **options)

    return convert


def _alpha(layer: Any, options: dict[str, Any]) -> KeyedDropout:
    return KeyedAlphaDropout(layer.p, inplace=layer.inplace, **options)


def _feature_alpha(layer: Any, options: dict[str, Any]) -> KeyedDropout:
    return KeyedAlphaDropout(layer.p, inplace=layer.inplace, per="channel", **options)


def _stochastic_depth(layer: Any, options: dict[str, Any]) -> KeyedDropout:
    return KeyedDropout(layer.p, per="sample", **options)


def _drop_path(layer: Any, options: dict[str, Any]) -> KeyedDropout:
    return KeyedDropout(layer.drop_prob or 0.0, per="sample", scaled=layer.scale_by_keep, **options)


_KINDS: dict[str, Convert] = {  # by name: importing torchvision takes time, and timm may not be installed
    "torch.nn.modules.dropout.Dropout": _dropout,
    "torch.nn.modules.dropout.Dropout1d": _channels(3),
    "torch.nn.modules.dropout.Dropout2d": _channels(None),  # torch takes 3 dimensions for [n, channels, length]
    "torch.nn.modules.dropout.Dropout3d": _channels(5),
    "torch.nn.modules.dropout.AlphaDropout": _alpha,
    "torch.nn.modules.dropout.FeatureAlphaDropout": _feature_alpha,
    "torchvision.ops.stochastic_depth.StochasticDepth": _stochastic_depth,
    "timm.layers.drop.DropPath": _drop_path,
}
