"""A trained network with its preprocessing: images in, class probabilities or logits out."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distributed.checkpoint.warm_start import evaluation_weights
from distributed.config import TrainConfig
from distributed.config.data import MAX_PIXELS
from distributed.config.given import check_model
from distributed.config.models import BuiltInModel, ImportedModel
from distributed.data.sources.decode import to_size
from distributed.errors import InputError
from distributed.files import home_path
from distributed.inference.saved_run import (
    Normalization,
    check_complete,
    choose_checkpoint,
    read_config,
    read_content,
    warn_about_changes,
)
from distributed.models.build import build_model, load_weights
from distributed.models.imported import GivenModel
from distributed.training.views import Views


class Classifier(nn.Module):
    """Maps float32 images [n, channels, h, w] with pixels in [0, 1] to logits [n, classes]; includes the normalization.

    `repeats_channel`: images of one channel become images of three equal ones, which the built-in networks take.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization, *, repeats_channel: bool = False) -> None:
        super().__init__()
        self.network = network
        self.repeats_channel = repeats_channel and len(normalization.mean) == 1
        for name, values in normalization._asdict().items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.eval()
        network.eval()  # which some networks override; the line above only calls `network.train(False)`

    def normalize(self, images: Tensor) -> Tensor:
        normalized = (images - self.mean) / self.deviation
        return normalized.expand(-1, 3, -1, -1) if self.repeats_channel else normalized

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


@dataclass(frozen=True)
class TrainedRun:
    """A run's network with the weights of one checkpoint, in evaluation mode, and everything needed to use it.

    Attributes:
        config: the run's resolved config.
        checkpoint: the folder of the checkpoint.
        classifier: the network behind its normalization.
        class_names: the name of each class, in the order of the logits.
        normalization: mean and standard deviation of each channel of the training images.
        stored_size: height and width of the images in the data set, to which all others are scaled first.
        input_shape: channels, height and width of the images that the classifier takes.
    """

    config: TrainConfig
    checkpoint: Path
    classifier: Classifier
    class_names: list[str]
    normalization: Normalization
    stored_size: tuple[int, int]
    input_shape: tuple[int, int, int]

    @property
    def network(self) -> nn.Module:
        """The trained network: preprocessed images [n, channels, h, w] to logits [n, classes]."""
        return self.classifier.network

    @property
    def image_size(self) -> int:
        """Height in pixels of the network's input; only of arrays that are not square does its width differ."""
        return self.input_shape[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize, crop and normalize images as for training. Accepts the images that `resize` accepts.

        Returns:
            float32 [n, channels, h, w] on the network's device.
        """
        return self.classifier.normalize(self.resize(images).to(self.classifier.mean.device))

    def resize(self, images: Tensor, *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Return the images in the size and with the channels of `input_shape`, as `resize` does."""
        channels, height, width = self.input_shape
        return resize(images, self.stored_size, (height, width), channels=channels, max_pixels=max_pixels)

    def logits(self, resized: Tensor) -> Tensor:
        """Return the logits of images that `resize` has returned, averaged over the views of the run's evaluations."""
        with torch.no_grad():
            return Views.of(self.config.evaluation).average(self.classifier, resized.to(self.classifier.mean.device))

    def predict(self, images: Tensor) -> Tensor:
        """Return class probabilities, float32 [n, classes], from the logits averaged over the views of the run's evaluations.

        Accepts the images that `resize` accepts.
        """
        return self.logits(self.resize(images)).softmax(1)


def resize(
    images: Tensor,
    stored: tuple[int, int],
    size: tuple[int, int] | None = None,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Scale images with antialiasing until they cover a size, crop the centre and return pixels in [0, 1].

    First to the size of the stored images, then to that of the network: an image that was scaled once is sharper than those
    of the training.

    Args:
        images: uint8 [n, c, height, width], or a single image [c, height, width], of 1 or 3 channels.
        stored: height and width of the stored images, whose pixels are multiples of 1 / 255.
        size: height and width of the returned images; None: as stored.
        channels: 1 or 3: colours become grey by their luma (ITU-R BT.601), grey becomes three equal channels.
        max_pixels: limit for an image between scaling and cropping.

    Returns:
        float32 [n, channels, h, w]; n is 1 for a single image.

    Raises:
        ValueError: the images have another type or shape, or one exceeds `max_pixels`.
    """
    batch = images[None] if images.dim() == 3 else images
    if images.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[1] not in (1, 3):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images: {found}; should be torch.uint8 [n, 3, height, width] or [3, height, width]")
    if channels == 1 and batch.shape[1] == 3:
        luma = torch.tensor([0.299, 0.587, 0.114], device=batch.device).view(3, 1, 1)
        batch = torch.stack([(image * luma).sum(0, keepdim=True).round().byte() for image in batch])
    sized = [to_size(image, *stored, max_pixels).permute(2, 0, 1) for image in batch]
    if size and size != stored:
        sized = [to_size(image, *size, max_pixels, rounded=False).permute(2, 0, 1) for image in sized]
    resized = torch.stack(sized) / 255
    return resized.expand(-1, channels, -1, -1)


def load(
    run: str | os.PathLike[str],
    *,
    model: GivenModel | None = None,
    checkpoint: str = "auto",
    device: str | torch.device = "cpu",
) -> TrainedRun:
    """Load the trained network of a run.

    Args:
        run: the run folder, e.g. `runs/cifar10`.
        model: the object that was given to `train`, for a network that cannot be imported; never for a built-in one.
        checkpoint: `best`, `latest` or the name of a checkpoint; `auto`: best if there is one, otherwise latest.
        device: device of the network and of the preprocessed images.

    Raises:
        InputError: not a run folder, no such checkpoint, or a damaged one.
    """
    folder = home_path(os.fspath(run))
    if folder.suffix == ".toml":
        raise InputError(f"{run}: a config file, not a run folder; read it with load_config")
    return load_checkpoint(read_config(folder), choose_checkpoint(folder, checkpoint), device=device, model=model)


def load_checkpoint(
    config: TrainConfig, checkpoint: Path, *, device: str | torch.device = "cpu", model: GivenModel | None = None
) -> TrainedRun:
    """Load the network of a checkpoint, without the run's data.

    Args:
        model: what Python code gave for the import path in the config.

    Raises:
        InputError: the checkpoint is damaged or does not fit the run's config.
    """
    if model is not None:
        check_model(model, "load()")
        if not isinstance(config.model, ImportedModel):
            raise InputError(f"load(): model was given, but the run has model.name = {config.model.name}; leave it out")
    check_complete(checkpoint)
    content = read_content(checkpoint)
    if model is None:
        warn_about_changes(content, {name: path for name, path in config.import_paths.items() if name == "model.name"})
    class_names, normalization = content["classes"], Normalization(**content["normalization"])
    network = build_model(config.model, num_classes=len(class_names), seed=config.seed, given=model)
    try:
        load_weights(network, evaluation_weights(checkpoint))  # float64 becomes float32
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"{checkpoint}: does not fit the run's config.toml: {reason}") from None
    is_built_in = isinstance(config.model, BuiltInModel)
    classifier = Classifier(network.requires_grad_(False), normalization, repeats_channel=is_built_in).to(device)
    stored, side = tuple(content["image_size"]), config.resized_side
    input_shape = (len(normalization.mean), *((side, side) if side else stored))
    return TrainedRun(config, checkpoint, classifier, class_names, normalization, stored, input_shape)
