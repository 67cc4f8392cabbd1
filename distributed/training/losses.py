"""The loss of a run as a function of logits and targets, and functions called shard by shard."""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed.config.functions import ImportedLoss, Loss, metric_name
from distributed.config.user_code import UserFunction

PerSample: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Computes one number per sample, [n], from logits [n, classes], in float32 or wider, and targets int64 [n]."""

CROSS_ENTROPY: PerSample = partial(F.cross_entropy, reduction="none")
_ARGUMENTS = ("logits", "targets")


class Losses(NamedTuple):
    """The loss in training, and in evaluations. They differ if labels are smoothed."""

    training: PerSample
    evaluation: PerSample


def build_losses(config: Loss | ImportedLoss, given: PerSample | None = None) -> Losses:
    """Return the config's loss.

    Args:
        given: the function, if it is not to be imported.

    Raises:
        InputError: it cannot be imported, or does not take the options.
    """
    if isinstance(config, Loss):
        smoothed = partial(F.cross_entropy, reduction="none", label_smoothing=config.label_smoothing)
        return Losses(smoothed, CROSS_ENTROPY)
    function = UserFunction(
        setting="loss.name",
        path=config.name,
        noun="function",
        result="one loss per sample",
        options=config.options,
        options_in="" if given and not config.options else "loss.options",
        positional=_ARGUMENTS,
    ).load(given)
    own = OwnLoss(partial(function, **copy.deepcopy(config.options)))
    return Losses(own, own)


class OwnLoss:
    """A loss of the user's: never called without samples, outside autocast, with a result in the type of the logits."""

    def __init__(self, function: PerSample) -> None:
        self.function = function

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not len(targets):  # depends on the logits, so that the backward pass reaches every parameter
            return logits.sum(1)
        with torch.autocast(logits.device.type, enabled=False):
            losses = self.function(logits, targets).to(logits.dtype)
        if logits.requires_grad and not losses.requires_grad:  # constant for these samples: all gradients are zero
            losses = torch.where(torch.zeros_like(losses, dtype=torch.bool), logits.sum(1), losses)
        return losses


def build_metrics(paths: tuple[str, ...]) -> dict[str, PerSample]:
    """Return the functions of `evaluation.metrics` by their names.

    Raises:
        InputError: one of them cannot be imported, or needs other arguments.
    """
    found = {}
    for path in paths:
        user = UserFunction(
            setting="evaluation.metrics",
            path=path,
            noun="function",
            result="one number per sample",
            positional=_ARGUMENTS,
        )
        found[metric_name(path)] = user.load()
    return found


def per_shard(function: PerSample, logits: Tensor, targets: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return a function's numbers [n], called separately on a copy of each shard that has samples.

    The last elements of a tensor may be rounded differently from the others, and a rank's number of shards depends on the
    number of ranks. A shard's samples do not.
    """
    results = [
        function(some.clone(), theirs.clone())
        for some, theirs in zip(torch.split(logits, list(sizes)), torch.split(targets, list(sizes)), strict=True)
        if len(theirs)
    ]
    return torch.cat(results) if results else logits.new_zeros(0)
