"""Builds the loss and the metrics of a run, and tries functions of the user's before any process group exists."""

from typing import NamedTuple

import torch

from distributed.config import TrainConfig
from distributed.data.pipeline import DataPipeline
from distributed.errors import reported_once
from distributed.topology import Topology
from distributed.training.losses import Losses, OwnLoss, PerSample, build_losses, build_metrics
from distributed.training.step_function import captures_graphs


class Functions(NamedTuple):
    """The loss of a run, and the metrics of its evaluations by name."""

    loss: Losses
    metrics: dict[str, PerSample]


def build_functions(
    config: TrainConfig, topology: Topology, data: DataPipeline, device: torch.device, loss: PerSample | None = None
) -> Functions:
    """Import loss and metrics. Those by import path, and the augmentation function, are tried on a few samples.

    Call this before creating a process group, and before the augmentation function is needed.

    Args:
        loss: the loss, if Python code gave it instead of an import path.

    Raises:
        InputError: a function cannot be imported or called, does not return one number per sample or such images, draws from
            a global random generator, or, in exact mode, combines samples.
    """
    with reported_once(topology.local_rank):
        functions = Functions(build_losses(config.loss, loss), build_metrics(config.evaluation.metrics))
        if config.imported_functions:
            _check(functions, config, topology, data, device)
    return functions


def _check(
    functions: Functions, config: TrainConfig, topology: Topology, data: DataPipeline, device: torch.device
) -> None:
    from distributed.training.function_checks import Check  # only imported functions need it

    check = Check(
        device,
        dtype=data.input_format.dtype,
        exact=bool(config.shards_on(device.type)),
        warns=topology.world_size > 1 and topology.is_main,
        captured=captures_graphs(config, device, world_size=topology.world_size),
    )
    if data.augment_function:
        check.augmentation(data.augment_function, data.raw_images(2))
    if isinstance(functions.loss.training, OwnLoss):
        check.loss(functions.loss.training.function, config.loss.name, num_classes=data.num_classes)
    for path, metric in zip(config.evaluation.metrics, functions.metrics.values(), strict=True):
        check.metric(metric, path, num_classes=data.num_classes)
