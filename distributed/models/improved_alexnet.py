"""The seeds' Improved AlexNet: 907,210 parameters at 10 classes, 50 MFLOP forward an image of 3x32x32."""

from torch import Tensor, nn

from distributed.models.keyed_dropout import KeyedDropout


def _block(channels_in: int, channels: int, activation: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels, kernel_size=3, padding=1), nn.BatchNorm2d(channels), activation]


class ImprovedAlexNet(nn.Module):
    """Images [n, 3, 32, 32] to logits [n, num_classes]."""

    def __init__(self, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *_block(3, 32, nn.LeakyReLU(0.1)),
            nn.MaxPool2d(2),
            *_block(32, 64, nn.ReLU()),
            nn.MaxPool2d(2),
            *_block(64, 128, nn.LeakyReLU(0.1)),
            *_block(128, 128, nn.ReLU()),
            *_block(128, 64, nn.LeakyReLU(0.1)),
            nn.MaxPool2d(2),
        )
        self.fc1 = nn.Linear(4 * 4 * 64, 512)
        self.dropout1 = KeyedDropout(dropout, features=512, name="dropout1")
        self.fc2 = nn.Linear(512, 128)
        self.dropout2 = KeyedDropout(dropout, features=128, name="dropout2")
        self.fc3 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        x = self.conv(images).flatten(1)
        x = self.dropout1(self.fc1(x).relu(), sample_keys)
        x = self.dropout2(self.fc2(x).relu(), sample_keys)
        logits: Tensor = self.fc3(x)
        return logits
