"""Builds a run's network, and tries an imported one before any process waits for another."""

import time

from torch import nn

from distributed.config import TrainConfig
from distributed.config.sections import ImportedModel
from distributed.data.pipeline import DataPipeline
from distributed.errors import InputError
from distributed.models.build import build_model
from distributed.models.imported import check_output
from distributed.topology import Topology


def build_network(config: TrainConfig, topology: Topology, data: DataPipeline) -> nn.Module:
    """Build the model on the CPU. Call this before creating a process group: an imported network may fail.

    Raises:
        InputError: an imported network cannot be built or does not return logits.
    """
    if not isinstance(config.model, ImportedModel):
        return build_model(config.model, num_classes=data.num_classes, seed=config.seed)
    example = data.example()
    images, keys = example.images[:2].cpu().float(), example.sample_keys[:2].cpu()
    try:
        model = build_model(config.model, num_classes=data.num_classes, seed=config.seed)
        check_output(model, images, keys, name=config.model.name, num_classes=data.num_classes, seed=config.seed)
    except InputError:
        if topology.local_rank:
            time.sleep(3)  # the first rank found the same: it reports that before torchrun ends all ranks
        raise
    return model
