"""A trained network as others use it: images in, logits out, nothing of training around it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed.checkpoint.warm_start import evaluation_weights
from distributed.config import TrainConfig
from distributed.data.pipeline import DataPipeline
from distributed.errors import InputError
from distributed.inference.saved_run import Normalization, check_whole, classes_of, content_of, normalization_of
from distributed.models.build import build_model


class Classifier(nn.Module):
    """Float32 images [n, 3, side, side] of pixels in [0, 1] to logits [n, classes]; the normalization is inside."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        for name, values in normalization._asdict().items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.deviation)
        return logits


@dataclass(frozen=True)
class Trained:
    """A run's classifier with the weights of a checkpoint, on the CPU in evaluation mode, and what its logits stand for."""

    classifier: Classifier
    classes: list[str]
    normalization: Normalization
    side: int


def load_trained(config: TrainConfig, checkpoint: Path, *, data: Callable[[], DataPipeline]) -> Trained:
    """The classifier of a run.

    Args:
        data: gives the run's images; called only where the checkpoint does not hold how they were normalized.

    Raises:
        InputError: the checkpoint is damaged or does not fit the run's config, or there is no data where it is needed.
    """
    check_whole(checkpoint)
    content = content_of(checkpoint)
    classes = classes_of(content, config)
    network = build_model(config.model, num_classes=len(classes), seed=config.seed)
    try:
        network.load_state_dict(evaluation_weights(checkpoint))  # float64 ones become float32
    except RuntimeError as error:
        raise InputError(f"{checkpoint}: does not fit the run's config.toml: {' '.join(str(error).split())}") from None
    normalization = normalization_of(content) or normalization_of(data().facts())
    assert normalization is not None
    side = config.model.input_side
    return Trained(Classifier(network.requires_grad_(False), normalization), classes, normalization, side)
