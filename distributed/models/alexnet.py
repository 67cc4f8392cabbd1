"""AlexNet variants of the two reference implementations. Images [n, 3, h, w] in, logits [n, num_classes] out."""

from collections.abc import Sequence

from torch import Tensor, nn

from distributed.models.local_response_norm import LocalResponseNorm
from distributed.models.resize import resize


class AlexNet(nn.Module):
    """Convolutions, then three linear layers with dropout between them.

    Args:
        conv: layers from images to [n, channels, h, w], which has `features[0]` values per image when flattened.
        features: input sizes of the three linear layers.
        side: height and width of the input; images of another size are resized.
    """

    def __init__(
        self, conv: Sequence[nn.Module], features: tuple[int, int, int], *, side: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Sequential(*conv)
        self.fc1 = nn.Linear(features[0], features[1])
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(features[1], features[2])
        self.dropout2 = nn.Dropout(dropout)
        self.fc3 = nn.Linear(features[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, num_classes]."""
        x = self.conv(resize(images, self.side)).flatten(1)
        x = self.dropout1(self.fc1(x).relu())
        x = self.dropout2(self.fc2(x).relu())
        logits: Tensor = self.fc3(x)
        return logits


def alexnet(num_classes: int, dropout: float) -> AlexNet:
    """Build reference 002's "AlexNet": 58,322,314 parameters for 10 classes, 2,262 MFLOP per forward pass and image."""
    layers = [
        nn.Conv2d(3, 96, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return AlexNet(layers, (6 * 6 * 256, 4096, 4096), side=224, num_classes=num_classes, dropout=dropout)


def improved_alexnet(num_classes: int, dropout: float) -> AlexNet:
    """Build reference 002's "Improved AlexNet": 907,210 parameters for 10 classes, 50 MFLOP per forward pass and image."""
    layers = [
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.LeakyReLU(0.1),
        nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
    ]  # fmt: skip
    return AlexNet(layers, (4 * 4 * 64, 512, 128), side=32, num_classes=num_classes, dropout=dropout)


def cifar_alexnet(num_classes: int, dropout: float) -> AlexNet:
    """Build reference 000's AlexNet, whose first filters are 5x5: 24,740,234 parameters for 10 classes, 484 MFLOP per image."""
    layers = [
        nn.Conv2d(3, 96, 5), nn.ReLU(), _lrn(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), _lrn(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), _lrn(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return AlexNet(layers, (2 * 2 * 256, 4096, 4096), side=32, num_classes=num_classes, dropout=dropout)


def cifar_alexnet_bn(num_classes: int, dropout: float) -> AlexNet:
    """Build `cifar_alexnet` with batch norm before each ReLU instead of local response norm."""
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
