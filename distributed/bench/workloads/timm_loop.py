"""timm's training loop, assembled as in its train.py: `create_loader` with the prefetcher, `create_optimizer_v2`, bfloat16
autocast (`--amp --amp-dtype bfloat16`), `--channels-last`."""

from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_loader  # type: ignore[import-not-found, unused-ignore]
from timm.data.transforms import ToNumpy  # type: ignore[import-not-found, unused-ignore]
from timm.optim import create_optimizer_v2  # type: ignore[import-not-found, unused-ignore]
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from distributed.bench.measure import StepClock
from distributed.bench.workloads.task import (
    DEVIATION,
    LR,
    MEAN,
    MOMENTUM,
    WEIGHT_DECAY,
    plain_model,
    training_images,
    use_device,
)  # fmt: skip

LOG_EVERY = 50  # steps between two reads of the loss from the device; train.py's default


class PilImages(Dataset[tuple[Any, int]]):
    """uint8 images [n, h, w, 3] as PIL images, with the `transform` attribute that timm's loaders set."""

    def __init__(self, images: NDArray[np.uint8], labels: list[int]) -> None:
        self.images, self.labels, self.side = [Image.fromarray(image) for image in images], labels, images.shape[1]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def run(clock: StepClock, *, root: str, batch: int, device: str, threads: int, workers: int) -> None:
    """Train until the measurement is complete."""
    target = use_device(device, threads)
    torch.backends.cudnn.benchmark = True  # as in train.py
    model = plain_model().to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(model, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    loss_fn = nn.CrossEntropyLoss()
    model.train()
    for step, (images, labels) in enumerate(_epochs(root, batch, target, workers)):
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(target.type, torch.bfloat16):
            loss = loss_fn(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY == 0:
            loss.item()
        if clock.tick():
            return


def _epochs(root: str, batch: int, device: torch.device, workers: int) -> Any:
    """Yield timm's batches, normalized on the device, epoch after epoch."""
    dataset = PilImages(*training_images(root))
    loader = create_loader(
        dataset, input_size=(3, 32, 32), batch_size=batch, is_training=True, mean=MEAN, std=DEVIATION,
        num_workers=workers, pin_memory=device.type == "cuda", device=device, use_prefetcher=True,
    )  # fmt: skip
    # Instead of timm's resizing and color jitter, the padded crop and flip of the other workloads.
    crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    dataset.transform = transforms.Compose([*crop, ToNumpy()])
    for epoch in repeat(loader):
        yield from epoch
