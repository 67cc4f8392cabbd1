"""Networks whose parameters are views into other tensors and in channels-last memory."""

from typing import Any

import torch
from torch import Tensor, nn


class Views(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.narrow = nn.Parameter(torch.randn(8, 20)[:, :8])
        self.later = nn.Parameter(torch.randn(9, 8)[1:])
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu().mean((2, 3)) @ self.narrow
        logits: Tensor = self.head((x @ self.later).relu())
        return logits


class Scaled(Views):
    """With a parameter that has no dimensions, like the temperature of CLIP."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


class Branches(Views):
    """With a branch on a value, which torch.export cannot trace."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if logits.mean() > 0 else -logits


class Grid(Views):
    """With an expanded buffer, whose elements share memory, like the coordinates of CoordConv."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("grid", torch.linspace(-1, 1, 8).expand(4, 8))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.grid.mean()


class Copies(Views):
    """With a state_dict of copies."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


def weight_norm(num_classes: int) -> nn.Module:
    """Build a network with the hook that parametrizations have replaced."""
    network = Views(num_classes)
    nn.utils.weight_norm(network.head)
    return network
