"""Checks, on a few images, that an imported network can be trained as configured, and finds what its engine needs to know."""

from collections.abc import Callable
from functools import partial

import torch
from loguru import logger
from torch import Tensor, nn

from distributed.config import TrainConfig
from distributed.data.batch import Batch
from distributed.data.pipeline import DataPipeline, Split
from distributed.errors import InputError
from distributed.exact.check.supported import changed_by_forward, check_exact, mixes_samples, replaced_tensors
from distributed.exact.shardable_layers import conditional_modules, layers_to_shard
from distributed.models.network_output import check_gradients, check_output, check_without_images
from distributed.models.plain_batch_norm import unsupported_batch_norms
from distributed.models.torch_compat import AnyBatchNorm
from distributed.topology import Topology
from distributed.training.capture_checks import check_captured, try_on_device
from distributed.training.step_function import captures_graphs

# torch's batch norm rejects one value per channel; the synchronized one does not.
_ONE_IMAGE = "some micro-batches have one image: change global_batch_size or grad_accum_steps, or set exact.shards"
_ONE_SIZE = (
    "raise data.augment.low_res_side, or remove it and data.augment.low_res_epochs if the network takes one size only"
)
_EVALUATED: tuple[Split, ...] = ("validation", "test")


def check_imported(
    model: nn.Module, config: TrainConfig, topology: Topology, data: DataPipeline, evaluates: Split | None
) -> tuple[dict[str, int], bool]:
    """Check that an imported network can be trained, or evaluated, as configured.

    Args:
        evaluates: the split to evaluate, if it is not to be trained.

    Returns:
        `Network.layers` and `Network.conditional`.

    Raises:
        InputError: it cannot.
    """
    images, keys = _inputs(data.example())
    name, device = config.model.name, data.input_format.device
    device_type = device.type
    check = partial(check_output, model, name=name, num_classes=data.num_classes, seed=config.seed)
    draws = check(images[:2], keys[:2])
    on_host = device_type == "cuda" and try_on_device(check, model, images[:2], keys[:2], config, device)
    if config.data.augment.low_res_epochs:
        small, small_keys = _inputs(data.example(low_res=True))
        _check_also(check, small[:2], small_keys[:2], remedy=_ONE_SIZE)
    if (
        topology.world_size == 1
        and not config.shards_on(device_type)
        and not evaluates
        and min(training_batches(data)) == 1
    ):
        _check_also(check, images[:1], keys[:1], remedy=_ONE_IMAGE)
    in_training = not evaluates and min(training_batches(data)) < data.shards.total
    if in_training or any(count < data.shards.total for count in evaluation_batches(data, evaluates)):
        check_without_images(
            model, images[:0], keys[:0], name=name, num_classes=data.num_classes, in_training=in_training
        )
    images = images[torch.arange(3) % len(images)]  # the passes change the copies
    check_backward = partial(
        check_gradients, model, images, keys[torch.arange(3) % len(keys)], name=name, seed=config.seed
    )
    if config.shards_on(device_type):
        try:
            check_exact(model, images, device_type=device_type)
        except InputError:
            raise
        except Exception:
            check_backward()  # says so in one line if it fails
            raise
    divided = config.shards_on(device_type) or topology.world_size > 1
    conditional = conditional_modules(model, images) if divided else set[str]()
    if not evaluates:
        _check_batch_norms(model, conditional, name)
        check_backward()
    if config.shards_on(device_type):
        return layers_to_shard(model, images, conditional), False
    if not evaluates:
        captured = captures_graphs(config, device, world_size=topology.world_size)
        _check_changes(model, images, config, captured=captured, draws_on_host=on_host)
    return _check_fast(model, config, topology, images, conditional, draws=draws)


def _check_changes(
    model: nn.Module, images: Tensor, config: TrainConfig, *, captured: bool, draws_on_host: bool
) -> None:
    """Raise InputError if the forward pass replaces a saved tensor, or cannot be captured if it has to be.

    The engine would save and average the first tensor.
    """
    name, replaced, saved = config.model.name, replaced_tensors(model, images), model.state_dict().keys()
    if wrong := [path for path in replaced if path in saved]:
        raise InputError(
            f"model.name = {name}: the forward pass replaces {wrong[0]}, so checkpoints would keep its first value; change "
            "it in place, e.g. by copy_"
        )
    if captured:
        one_size = not config.data.augment.low_res_epochs
        check_captured(model, images, name, replaced=replaced, draws_on_host=draws_on_host, one_size=one_size)


def _check_fast(
    model: nn.Module, config: TrainConfig, topology: Topology, images: Tensor, conditional: set[str], *, draws: bool
) -> tuple[dict[str, int], bool]:
    """Raise InputError if an imported network cannot be trained in fast mode; warn about what will not repeat its bits."""

    name = config.model.name
    if draws and topology.is_main:
        logger.warning(
            "model.name = {}: training draws from a global generator, e.g. in F.dropout: a resumed run will not repeat the "
            "bits of an undisturbed one; use dropout layers, whose masks depend only on seed, epoch and image",
            name,
        )
    if topology.is_main:
        _warn_about_changes(model, images, name, several=topology.world_size > 1)
    if topology.world_size > 1 and (unsupported := unsupported_batch_norms(model)):
        raise InputError(f"model.name = {name}, on several processes: {'; '.join(unsupported)}")
    if topology.world_size > 1 and (reason := mixes_samples(model, images)) and topology.is_main:
        logger.warning("model.name = {}: results depend on how the batch is split over the ranks: {}", name, reason)
    if topology.world_size == 1:
        return {}, False
    if conditional and (
        config.engine.name == "fsdp" or (config.engine.name == "deepspeed" and config.engine.zero_stage)
    ):
        raise InputError(
            f"model.name = {name}: engine.name = {config.engine.name} shards gradients, for which every rank has to use every "
            f"parameter, but {sorted(conditional)[0]} is used by some images only: set engine.name = ddp"
        )
    if config.engine.name != "fsdp":
        return {}, bool(conditional)
    if scalars := [path for path, parameter in model.named_parameters() if not parameter.dim()]:
        raise InputError(
            f"model.name = {name}: engine.name = fsdp cannot shard {scalars[0]}, which has no dimensions: give it the shape "
            "[1], or set engine.name = ddp"
        )
    return layers_to_shard(model, images), False


def _check_also(check: Callable[[Tensor, Tensor], bool], images: Tensor, keys: Tensor, *, remedy: str) -> None:
    """Raise InputError, with this remedy, if the network does not take these images."""
    try:
        check(images, keys)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None


def _check_batch_norms(model: nn.Module, conditional: set[str], name: str) -> None:
    """Raise InputError if only some images use a batch norm: every shard and rank takes part in its statistics."""
    for path in sorted(conditional):
        if isinstance(model.get_submodule(path), AnyBatchNorm):
            raise InputError(
                f"model.name = {name}: {path} is a batch norm that only some images use, but every shard and rank has to take "
                "part in its statistics: use group norm or layer norm there"
            )


def _warn_about_changes(model: nn.Module, images: Tensor, name: str, *, several: bool) -> None:
    """Warn about what a forward pass changes: checkpoints lack attributes, and ranks do not exchange buffers."""

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


def _inputs(example: Batch) -> tuple[Tensor, Tensor]:
    """Return images and keys for passes on the CPU in float32."""
    return example.images.cpu().float(), example.sample_keys.cpu()
