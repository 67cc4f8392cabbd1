"""A module of networks, good and bad, as a user would write it beside the command."""

from pathlib import Path

NETWORKS = """\
import random

import numpy
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=8, drop=0.25):
        super().__init__()
        self.head = nn.Linear(width, num_classes)
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)
        nn.init.constant_(self.conv.bias, 0.125)

    def forward(self, images):
        x = self.norm(self.conv(images)).relu()
        return self.head(self.drop(x.mean((2, 3))))


def make(num_classes, width=8, drop=0.25):
    return Net(num_classes, width, drop)


def draws(num_classes):
    net = Net(num_classes)
    net.register_buffer("drawn", torch.tensor([random.random(), numpy.random.rand(), torch.rand(()).item()]))
    torch.set_default_dtype(torch.float64)
    return net.eval()


def passes_on(num_classes, **options):
    return Net(num_classes, **options)


def without_classes(width):
    return Net(10, width)


def needs_width(num_classes, width):
    return Net(num_classes, width)


def fails(num_classes):
    raise ValueError("no\\nway")


def exits(num_classes):
    raise SystemExit(3)


def nothing(num_classes):
    return None


def empty(num_classes):
    return nn.Flatten()


def frozen(num_classes):
    return Net(num_classes).requires_grad_(False)


def double(num_classes):
    return Net(num_classes).double()


def complex_weight(num_classes):
    net = Net(num_classes)
    net.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return net


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def on_meta(num_classes):
    with torch.device("meta"):
        return Net(num_classes)


def other_classes(num_classes):
    return Net(num_classes + 1)


class Pair(Net):
    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class NoForward(Net):
    def forward(self, images):
        return self.head(images)


class Detached(Net):
    def forward(self, images):
        with torch.no_grad():
            return super().forward(images)


class Recomputed(Net):
    def forward(self, images):
        return torch.utils.checkpoint.checkpoint(super().forward, images, use_reentrant=False)


class Extra(Net):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass


number = 3
"""


def write_networks(folder: Path, name: str = "own_networks") -> str:
    """Write the module NAME.py into the folder, and return its name."""
    (folder / f"{name}.py").write_text(NETWORKS)
    return name
