"""A small network for images of one channel and any size; examples/own-network/shapes.toml names `make`."""

from itertools import pairwise

import torch
from torch import nn


class ShapesNet(nn.Module):
    """Three convolutions, the mean over the image, and one linear layer."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in pairwise([1, width, 2 * width, 4 * width]):
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [n, classes] for images [n, 1, height, width]."""
        return self.head(self.dropout(self.blocks(images).mean((2, 3))))


def make(num_classes: int, width: int = 16, dropout: float = 0.1) -> nn.Module:
    """Build the network; `model.options` sets width and dropout."""
    return ShapesNet(num_classes, width, dropout)
