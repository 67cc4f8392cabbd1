"""Builds a run's network and checks, before any process group exists, that it can be trained as configured."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from distributed.checkpoint.warm_start import start_from
from distributed.comm import collectives
from distributed.config import TrainConfig
from distributed.config.models import BuiltInModel, ImportedModel
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline, Split
from distributed.errors import InputError, reported_once
from distributed.host.importable import SCRIPT
from distributed.host.versions import require_deepspeed
from distributed.models.build import build_model
from distributed.models.fast_alexnet import FastAlexNet, whitening
from distributed.models.grad_checkpointing import blocks_to_checkpoint, check_checkpointing
from distributed.models.imported import GivenModel
from distributed.models.plain_batch_norm import unsupported_batch_norms
from distributed.topology import Topology

_EVALUATED: tuple[Split, ...] = ("validation", "test")
_IMAGES_FOR_WHITENING = 1000  # of almost a thousand patches each


class Network(NamedTuple):
    """A model in float32 on the CPU with its initial weights. layers: by name, the convolutions and linear layers whose
    parameters nothing else uses, each with its number of calls in a forward pass."""

    model: nn.Module
    layers: dict[str, int]


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
            return Network(model, _check_imported(model, config, topology, data, evaluates))
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
            images, keys = _inputs(data.example())
            check_checkpointing(network.model, blocks, images[:2], keys[:2])
        start_from(config, topology, network.model)
    return network


def whiten_first_layer(model: nn.Module, data: DataPipeline) -> None:
    """Set the first layer of a `FastAlexNet` by the training images; rank 0 computes its weights. A collective."""
    assert isinstance(model, FastAlexNet)
    weight = whitening(model.resized(data.inputs(_IMAGES_FOR_WHITENING).cpu())) if collectives.rank() == 0 else None
    model.set_whitening(collectives.broadcast_object(weight))


def _check_imported(
    model: nn.Module, config: TrainConfig, topology: Topology, data: DataPipeline, evaluates: Split | None
) -> dict[str, int]:
    """Raise InputError if an imported network cannot be trained as configured; return `Network.layers`."""
    from distributed.exact.check.supported import check_exact, mixes_samples  # only imported networks need these
    from distributed.exact.shardable_layers import layers_to_shard
    from distributed.models.network_output import check_output, check_without_images

    images, keys = _inputs(data.example())
    name, device_type = config.model.name, data.input_format.device.type
    check = partial(check_output, model, name=name, num_classes=data.num_classes, seed=config.seed)
    draws = check(images[:2], keys[:2])
    if config.data.augment.low_res_epochs:
        _check_low_res(check, data)
    if (
        topology.world_size == 1
        and not config.shards_on(device_type)
        and not evaluates
        and min(training_batches(data)) == 1
    ):
        try:
            check(images[:1], keys[:1])
        except InputError as error:  # torch's batch norm rejects one value per channel; the synchronized one does not
            raise InputError(
                f"{error}; some micro-batches have one image: change global_batch_size or grad_accum_steps, or set "
                "exact.shards"
            ) from None
    in_training = not evaluates and min(training_batches(data)) < data.shards.total
    if in_training or any(count < data.shards.total for count in evaluation_batches(data, evaluates)):
        check_without_images(
            model, images[:0], keys[:0], name=name, num_classes=data.num_classes, in_training=in_training
        )
    images = images[torch.arange(3) % len(images)]  # the passes change the copies
    if config.shards_on(device_type):
        check_exact(model, images, device_type=device_type)
        return layers_to_shard(model, images)
    if draws and topology.is_main:
        logger.warning(
            "model.name = {}: training draws from torch's generator, e.g. in F.dropout: a resumed run will not repeat the bits "
            "of an undisturbed one; use dropout layers, whose masks depend only on seed, epoch and image",
            name,
        )
    if topology.is_main:
        _warn_about_changes(model, images, name, several=topology.world_size > 1)
    if topology.world_size > 1 and (unsupported := unsupported_batch_norms(model)):
        raise InputError(f"model.name = {name}, on several processes: {'; '.join(unsupported)}")
    if topology.world_size > 1 and (reason := mixes_samples(model, images)) and topology.is_main:
        logger.warning("model.name = {}: results depend on how the batch is split over the ranks: {}", name, reason)
    if config.engine.name != "fsdp" or topology.world_size == 1:
        return {}
    if scalars := [path for path, parameter in model.named_parameters() if not parameter.dim()]:
        raise InputError(
            f"model.name = {name}: engine.name = fsdp cannot shard {scalars[0]}, which has no dimensions: give it the shape "
            "[1], or set engine.name = ddp"
        )
    return layers_to_shard(model, images)


def _inputs(example: Batch) -> tuple[Tensor, Tensor]:
    """Return images and keys for passes on the CPU in float32."""
    return example.images.cpu().float(), example.sample_keys.cpu()


def _check_low_res(check: Callable[[Tensor, Tensor], bool], data: DataPipeline) -> None:
    """Raise InputError if the network does not take images of `data.augment.low_res_side`."""
    images, keys = _inputs(data.example(low_res=True))
    try:
        check(images[:2], keys[:2])
    except InputError as error:
        raise InputError(
            f"{error}; raise data.augment.low_res_side, or remove it and data.augment.low_res_epochs if the network takes one "
            "size only"
        ) from None


def _warn_about_changes(model: nn.Module, images: Tensor, name: str, *, several: bool) -> None:
    """Warn about what a forward pass changes: checkpoints lack attributes, and ranks do not exchange buffers."""
    from distributed.exact.check.supported import changed_by_forward

    changed, saved = changed_by_forward(model, images), model.state_dict().keys()
    if kept := [path for path in changed if path not in saved]:
        logger.warning(
            "model.name = {}: the forward pass changes {}, which is not in checkpoints: if results depend on it, a resumed "
            "run will not repeat the bits of an undisturbed one; make it a buffer",
            name, kept[0],
        )  # fmt: skip
    if several and (own := [path for path in changed if path in saved]):
        logger.warning(
            "model.name = {}: the forward pass updates the buffer {} from each rank's own images, so it differs between ranks; "
            "checkpoints contain rank 0's copy",
            name, own[0],
        )  # fmt: skip


def training_batches(data: DataPipeline) -> list[int]:
    """Return the number of images in the smallest micro-batch of each kind of step: most steps, and the last of an epoch."""
    batch, size = data.batching.global_batch_size, data.size("train")
    return [max(1, count // data.batching.grad_accum_steps) for count in (min(batch, size), size % batch) if count]


def evaluation_batches(data: DataPipeline, split: Split | None = None) -> list[int]:
    """Return the sizes of the batches of one split, or of the splits that a training evaluates."""
    step, splits = data.batching.evaluation_batch_size, [split] if split else _EVALUATED
    sizes = [data.size(each) for each in splits]
    return [count for size in sizes for count in (min(step, size), size % step) if count]


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
