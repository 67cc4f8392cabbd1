"""The AlexNet variants of the seeds, to be read beside their table. Images [n, 3, h, w] in, logits [n, num_classes] out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed.models.keyed_dropout import KeyedDropout
from distributed.models.local_response_norm import LocalResponseNorm


class AlexNet(nn.Module):
    """Convolutions, then three linear layers with dropout between them.

    Args:
        conv: layers from images to [n, channels, h, w]; flattened that is `features[0]` numbers.
        features: inputs of the three linear layers.
        side: images of another height and width are resized to it first.
    """

    def __init__(
        self, conv: Sequence[nn.Module], features: tuple[int, int, int], *, side: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Sequential(*conv)
        self.fc1 = nn.Linear(features[0], features[1])
        self.dropout1 = KeyedDropout(dropout, features=features[1], name="dropout1")
        self.fc2 = nn.Linear(features[1], features[2])
        self.dropout2 = KeyedDropout(dropout, features=features[2], name="dropout2")
        self.fc3 = nn.Linear(features[2], num_classes)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """sample_keys: int64 [n, 2], needed in training, for dropout."""
        x = self.conv(_resized(images, self.side)).flatten(1)
        x = self.dropout1(self.fc1(x).relu(), sample_keys)
        x = self.dropout2(self.fc2(x).relu(), sample_keys)
        logits: Tensor = self.fc3(x)
        return logits


def alexnet(num_classes: int, dropout: float) -> AlexNet:
    """Seed 002's "AlexNet": 58,322,314 parameters at 10 classes, 2,262 MFLOP forward an image."""
    layers = [
        nn.Conv2d(3, 96, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return AlexNet(layers, (6 * 6 * 256, 4096, 4096), side=224, num_classes=num_classes, dropout=dropout)


def improved_alexnet(num_classes: int, dropout: float) -> AlexNet:
    """Seed 002's "Improved AlexNet": 907,210 parameters at 10 classes, 50 MFLOP forward an image."""
    layers = [
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.LeakyReLU(0.1),
        nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
    ]  # fmt: skip
    return AlexNet(layers, (4 * 4 * 64, 512, 128), side=32, num_classes=num_classes, dropout=dropout)


def cifar_alexnet(num_classes: int, dropout: float) -> AlexNet:
    """Seed 000's AlexNet with 5x5 filters first: 24,740,234 parameters at 10 classes, 484 MFLOP forward an image."""
    layers = [
        nn.Conv2d(3, 96, 5), nn.ReLU(), _lrn(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), _lrn(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), _lrn(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return AlexNet(layers, (2 * 2 * 256, 4096, 4096), side=32, num_classes=num_classes, dropout=dropout)


def cifar_alexnet_bn(num_classes: int, dropout: float) -> AlexNet:
    """`cifar_alexnet` with batch norm before each ReLU in place of local response norm."""
    layers = [
        nn.Conv2d(3, 96, 5), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.BatchNorm2d(384), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.BatchNorm2d(384), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return AlexNet(layers, (2 * 2 * 256, 4096, 4096), side=32, num_classes=num_classes, dropout=dropout)


def _lrn() -> nn.Module:
    return LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)


def _resized(images: Tensor, side: int) -> Tensor:
    """Bilinear and antialiased, as torchvision's Resize does."""
    if images.shape[2:] == (side, side):
        return images
    if not len(images):  # an empty shard, which interpolate refuses
        return images.new_empty(0, images.shape[1], side, side)
    resized = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return resized.contiguous(memory_format=_layout(images))


def _layout(images: Tensor) -> torch.memory_format:
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
