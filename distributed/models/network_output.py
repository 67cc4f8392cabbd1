"""Tries an imported network on a few images, or none, and checks what it returns."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from distributed.config.user_code import described
from distributed.errors import InputError
from distributed.models.imported import copied, generator_states, seeded
from distributed.models.keyed_dropout import use_sample_keys


def check_output(
    model: nn.Module,
    images: Tensor,
    sample_keys: Tensor,
    *,
    name: str,
    num_classes: int,
    seed: int,
    low: torch.dtype | None = None,
) -> bool:
    """Check, on a copy of the model on the images' device, that it returns logits [n, num_classes] in either mode.

    Args:
        images: a few images of the data set, float32 [n, 3, side, side].
        sample_keys: int64 [n, 2], for dropout masks.
        low: the dtype of autocast; None: without autocast.

    Returns:
        Whether it draws from a generator of torch on the CPU, of Python or of NumPy in training.

    Raises:
        InputError: the model fails on such images or returns something else.
    """
    shape, draws = list(images.shape), False
    probe = copied(model, name).to(images.device)
    for mode in ("evaluation", "training"):
        try:
            autocast = torch.autocast(images.device.type, low) if low else nullcontext()
            with torch.no_grad(), seeded(seed, "probe"), use_sample_keys(sample_keys), autocast:
                before = generator_states()
                probe.train(mode == "training")
                output = probe(images)
                draws = generator_states() != before
        except (InputError, torch.OutOfMemoryError):  # the former of a dropout layer
            raise
        except Exception as error:
            raise InputError(
                f"model.name = {name}: the network fails in {mode} on images of shape {shape}{_place(images)}: "
                f"{described(error)}"
            ) from error
        expected = [len(images), num_classes]
        if isinstance(output, Tensor) and list(output.shape) == expected and output.is_floating_point():
            continue
        found = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"model.name = {name}: in {mode} the network returns {found} for images of shape {shape}; it should return "
            f"logits, a float tensor of shape {expected}"
        )
    return draws


def _place(images: Tensor) -> str:
    """Return where the images are, unless that is the CPU: a constant that is no buffer stays there."""
    return "" if images.device.type == "cpu" else f" on {images.device.type}"


def check_without_images(
    model: nn.Module, images: Tensor, sample_keys: Tensor, *, name: str, num_classes: int, in_training: bool
) -> None:
    """Check, on a copy of the model, that it accepts a batch of no images: the last batch may leave a shard without any.

    Args:
        in_training: whether this happens in training, where the logits need a gradient, or only in evaluation.

    Raises:
        InputError: it does not, like one that calls x.view(len(x), -1), or does not return logits [0, num_classes].
    """
    probe, reason = copied(model, name), "and some batch has fewer images than there are shards"
    for training in (False, True) if in_training else (False,):
        try:
            with torch.set_grad_enabled(training), use_sample_keys(sample_keys):
                probe.train(training)
                logits = probe(images)
        except Exception as error:
            raise InputError(
                f"model.name = {name}: the network fails on a batch without images, {reason}: {described(error)}; e.g. write "
                "x.flatten(1) instead of x.view(len(x), -1)"
            ) from error
        is_tensor = isinstance(logits, Tensor)
        if not is_tensor or list(logits.shape) != [0, num_classes] or (training and not logits.requires_grad):
            found = (
                f"{list(logits.shape)}, requires_grad {logits.requires_grad}" if is_tensor else type(logits).__name__
            )
            raise InputError(
                f"model.name = {name}: a batch with fewer images than there are shards leaves a shard without images, for "
                f"which the network returns {found}; it should return logits of shape [0, {num_classes}]"
            )


def check_gradients(model: nn.Module, images: Tensor, sample_keys: Tensor, *, name: str, seed: int) -> None:
    """Check, on a copy of the model on the CPU, that the backward pass works and gives some parameter a gradient.

    Args:
        images, sample_keys: as for `check_output`.

    Raises:
        InputError: it does not.
    """
    probe = copied(model, name)
    probe.train()
    try:
        with seeded(seed, "probe"):
            with use_sample_keys(sample_keys):
                logits = probe(images)
            if logits.requires_grad:
                logits.sum().backward()  # outside the keys, as in training
    except Exception as error:
        raise InputError(
            f"model.name = {name}: the backward pass fails: {described(error)}; if the network checkpoints its activations "
            "itself, turn that off; in fast mode, set grad_checkpointing.enabled = true instead"
        ) from error
    if not any(parameter.grad is not None for parameter in probe.parameters()):
        raise InputError(
            f"model.name = {name}: in training the logits depend on no parameter that requires gradients; is the head called "
            "under torch.no_grad, or are its inputs detached?"
        )
