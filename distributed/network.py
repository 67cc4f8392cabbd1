"""Builds a run's network and checks, before any process group exists, that it can be trained as configured."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distributed.checkpoint.warm_start import start_from
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.models import BuiltInModel, ImportedModel
from distributed.data.pipeline import DataPipeline, Split
from distributed.errors import InputError, reported_once
from distributed.host.importable import SCRIPT
from distributed.host.versions import require_deepspeed
from distributed.models.build import build_model
from distributed.models.fast_alexnet import FastAlexNet, whitening
from distributed.models.grad_checkpointing import blocks_to_checkpoint, check_checkpointing
from distributed.models.imported import GivenModel
from distributed.topology import Topology

_IMAGES_FOR_WHITENING = 1000  # of almost a thousand patches each


class Network(NamedTuple):
    """A model in float32 on the CPU with its initial weights.

    layers: by name, the convolutions and linear layers whose parameters nothing else uses, each with its number of calls in a
        forward pass.
    conditional: whether some images do not use all parameters, so that ranks may have different gradients.
    """

    model: nn.Module
    layers: dict[str, int]
    conditional: bool = False


def build_network(
    config: TrainConfig,
    topology: Topology,
    data: DataPipeline,
    given: GivenModel | None = None,
    *,
    evaluates: Split | None = None,
) -> Network:
    """Build the network. An imported one is tried on a few images, in throwaway passes that leave it unchanged.

    Call this before creating a process group.

    Args:
        given: what Python code gave for the import path in the config.
        evaluates: the split to evaluate, if it is not to be trained.

    Raises:
        InputError: the network cannot be imported, does not return logits, or exact mode does not support it; or its engine
            is not installed.
    """
    with reported_once(topology.local_rank):
        if config.engine.name == "deepspeed" and topology.world_size > 1:  # a single process does not use it
            require_deepspeed()
        model = build_model(config.model, num_classes=data.num_classes, seed=config.seed, given=given)
        side = config.data.augment.low_res_side
        if isinstance(model, FastAlexNet):
            model.low_res_side = side
        elif side and isinstance(config.model, BuiltInModel):
            raise InputError(
                f"data.augment.low_res_side = {side} saves no time with model.name = {config.model.name}, which resizes all "
                "images to one size: remove it and data.augment.low_res_epochs, or set model.name = fast_alexnet"
            )
        if isinstance(config.model, ImportedModel):
            from distributed.training.network_checks import check_imported  # slow to import

            return Network(model, *check_imported(model, config, topology, data, evaluates))
    return Network(model, {name: 1 for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)})


def build_initial_network(
    config: TrainConfig, topology: Topology, data: DataPipeline, given: GivenModel | None = None
) -> Network:
    """Build the network as `build_network` does, with the weights that `init_from` names unless the run has saved.

    Raises:
        InputError: also if these weights do not fit, or if gradient checkpointing is not possible.
    """
    network = build_network(config, topology, data, given)
    with reported_once(topology.local_rank):
        if blocks := blocks_to_checkpoint(network.model, config.grad_checkpointing):
            example = data.example()
            check_checkpointing(network.model, blocks, example.images[:2].cpu().float(), example.sample_keys[:2].cpu())
        start_from(config, topology, network.model)
    return network


def whiten_first_layer(model: nn.Module, data: DataPipeline) -> None:
    """Set the first layer of a `FastAlexNet` by the training images; rank 0 computes its weights. A collective."""
    assert isinstance(model, FastAlexNet)
    weight = whitening(model.resized(data.inputs(_IMAGES_FOR_WHITENING).cpu())) if collectives.rank() == 0 else None
    model.set_whitening(collectives.broadcast_object(weight))


def check_same_weights(model: nn.Module, *, name: str, init_from: Path | None = None) -> None:
    """Raise InputError on all ranks unless all of them have the same initial weights and buffers. A collective."""
    if collectives.world_size() == 1:
        return
    digests = {
        path: (str(tensor.dtype), list(tensor.shape), hashlib.blake2b(_bytes(tensor), digest_size=8).hexdigest())
        for path, tensor in model.state_dict().items()
    }
    first, *others = collectives.gather_objects(digests)
    for rank, other in enumerate(others, start=1):
        if different := [path for path in {**first, **other} if first.get(path) != other.get(path)]:
            if init_from:
                raise InputError(
                    f"init_from = {init_from}: rank {rank}'s initial weights differ from rank 0's, e.g. {different[0]}; "
                    "every node needs the same file, and the same module if the network is imported"
                )
            remedy = (
                "call torch.manual_seed before a module is built, or give train() the function or class that builds it"
                if name.startswith(f"{SCRIPT}:")
                else "every node needs the same module, and the factory should draw from the generators of torch, Python or "
                "NumPy only"
            )
            raise InputError(
                f"model.name = {name}: rank {rank} built a different network from rank 0 ({different[0]} differs); {remedy}"
            )


def _bytes(tensor: Tensor) -> Any:
    # Of a copy: memory that NumPy has seen cannot be resized, but sharded weights free theirs.
    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().data
