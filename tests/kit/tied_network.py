"""A network whose first layer in order has the classes, with tied weights and a layer that it does not use."""

import os

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    def __init__(self, num_classes: int, width: int = 24) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.encode, self.decode = nn.Linear(width, width), nn.Linear(width, width)
        self.decode.weight = self.encode.weight
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("first", self.scale[:1])

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu().mean((2, 3))
        logits: Tensor = self.head(self.decode(self.encode(x).relu()) * self.first)
        return logits


class Merging(Tied):
    """Merges a product of two matrices into the weight of its last layer in `eval`, like LoRA."""

    def __init__(self, num_classes: int, width: int = 24) -> None:
        super().__init__(num_classes, width)
        self.down, self.up = nn.Parameter(torch.randn(1, width)), nn.Parameter(torch.randn(num_classes, 1))

    def train(self, mode: bool = True) -> nn.Module:
        if mode != self.training:
            self.head.weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)
        return super().train(mode)


def of_each_rank(num_classes: int) -> nn.Module:
    """Build a network that is not the same on rank 1."""
    network = Tied(num_classes)
    nn.init.constant_(network.head.bias, float(os.environ["RANK"]))
    return network
