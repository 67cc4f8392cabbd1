"""Builds a model with its initial weights: keyed by (seed, parameter name), or those of an imported network's factory."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from distributed import rng
from distributed.config.models import BuiltInModel, FastAlexNet, ImportedModel, Model
from distributed.models import alexnet, fast_alexnet
from distributed.models.convert_dropout import convert_dropout
from distributed.models.imported import GivenModel, build_imported
from distributed.models.plain_batch_norm import make_batch_norm_local


def build_model(
    config: BuiltInModel | ImportedModel, *, num_classes: int, seed: int, given: GivenModel | None = None
) -> nn.Module:
    """Build the config's network in float32 on the CPU, with keyed dropout; its initial weights depend on the seed alone.

    Its batch norm sees the local batch only: engines synchronize it. `whiten_first_layer` completes a whitened network.

    Args:
        given: what Python code gave for the import path in the config.

    Raises:
        InputError: the network is to be imported, and that fails.
    """
    if isinstance(config, ImportedModel):
        imported = build_imported(config, num_classes=num_classes, seed=seed, given=given)
        make_batch_norm_local(imported)
        return convert_dropout(imported)
    if isinstance(config, FastAlexNet):
        fast = fast_alexnet.FastAlexNet(
            num_classes, widths=config.widths, whitening=config.whitening, activation=config.activation
        )
        initialize(fast, seed=seed)
        fast.start_as_identity()
        return fast
    assert isinstance(config, Model)
    model: nn.Module = getattr(alexnet, config.name)(num_classes, config.dropout)
    initialize(model, seed=seed, init=config.init)
    return convert_dropout(model)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights and buffers of a saved model into this one. Tensors of another dtype are converted.

    Raises:
        RuntimeError: names or shapes differ.
    """
    found: Any = OrderedDict(weights)
    found._metadata = getattr(model.state_dict(), "_metadata", None)  # torchvision's MNASNet looks for a version in it
    model.load_state_dict(found)


def initialize(model: nn.Module, *, seed: int, init: Literal["torch", "he"] = "torch") -> None:
    """Initialize the weights of convolutions and linear layers. Batch norm starts as the identity, as torch leaves it.

    Args:
        init: "torch" draws weights and biases from torch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (Kaiming uniform
            with a = sqrt(5)); activations shrink from layer to layer unless batch norm rescales them. "he" draws weights
            from U(-sqrt(6/fan_in), sqrt(6/fan_in)), which preserves the variance of activations through ReLUs (He et al.
            2015, arXiv 1502.01852), and sets biases to zero.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = math.sqrt((6 if init == "he" else 1) / module.weight[0].numel())
            for name, parameter in module.named_parameters(recurse=False):
                if init == "he" and name == "bias":
                    nn.init.zeros_(parameter)
                else:
                    rng.fill_uniform_(parameter, bound, seed=seed, name=f"{prefix}.{name}")
