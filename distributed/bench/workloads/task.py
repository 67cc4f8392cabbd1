"""The task that every training workload of `bench train` solves: one network, one optimizer, the same images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distributed.data.sources import cifar
from distributed.models.alexnet import improved_alexnet

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


def plain_model() -> nn.Module:
    """Return improved AlexNet built of torch's own layers."""
    hidden = [nn.Linear(1024, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 128), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(improved_alexnet(10, 0.5).conv, nn.Flatten(), *hidden, nn.Linear(128, 10))


def plain_sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    """Return torch's SGD with Nesterov momentum; `options` are further arguments of it."""
    return torch.optim.SGD(
        model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, **options
    )


def training_images(root: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Return CIFAR-10's 50,000 training images, uint8 [n, 32, 32, 3], and their labels."""
    source = cifar.read("cifar10", Path(root), "train")
    return source.images, source.labels.tolist()


def use_device(device: str, threads: int) -> torch.device:
    """Return the device, with torch limited to `threads` CPU threads (0: torch's default), and without TF32.

    The references and this project compute float32 in float32. TF32 would keep 10 of the 23 bits of its mantissa.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if threads:
        torch.set_num_threads(threads)
    return torch.device(device)
