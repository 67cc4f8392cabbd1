"""timm's training loop, as its train.py puts it together: `create_loader` with the prefetcher, `create_optimizer_v2`, autocast
in bfloat16 (`--amp --amp-dtype bfloat16`), `--channels-last`."""

from itertools import repeat
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader  # type: ignore[import-not-found, unused-ignore]
from timm.data.transforms import ToNumpy  # type: ignore[import-not-found, unused-ignore]
from timm.optim import create_optimizer_v2  # type: ignore[import-not-found, unused-ignore]
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from distributed.bench.clock import StepClock
from distributed.bench.workload import (
    DEVIATION,
    LR,
    MEAN,
    MOMENTUM,
    WEIGHT_DECAY,
    plain_model,
    prepare,
    training_images,
)  # fmt: skip

LOG_EVERY = 50  # train.py's default: the loss is read from the device so often


class Pictures(Dataset[tuple[Any, int]]):
    """PIL images with the `transform` that timm's loaders expect of a data set."""

    def __init__(self, root: str) -> None:
        images, self.labels = training_images(root)
        self.pictures = [Image.fromarray(image) for image in images]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def run(clock: StepClock, *, root: str, batch: int, device: str, threads: int, workers: int) -> None:
    """Train until the clock has enough."""
    place = prepare(device, threads)
    torch.backends.cudnn.benchmark = True  # as train.py does
    model = plain_model().to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(model, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    loss_fn = nn.CrossEntropyLoss()
    model.train()
    for step, (images, labels) in enumerate(_epochs(root, batch, place, workers)):
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(place.type, torch.bfloat16):
            loss = loss_fn(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY == 0:
            loss.item()
        if clock.tick():
            return


def _epochs(root: str, batch: int, device: torch.device, workers: int) -> Any:
    """timm's batches, normalized on the device, epoch after epoch."""
    pictures = Pictures(root)
    loader = create_loader(
        pictures, input_size=(3, 32, 32), batch_size=batch, is_training=True, mean=MEAN, std=DEVIATION,
        num_workers=workers, pin_memory=device.type == "cuda", device=device, use_prefetcher=True,
    )  # fmt: skip
    # timm resizes and jitters; the same work as the others' is a padded crop and a flip.
    crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    pictures.transform = transforms.Compose([*crop, ToNumpy()])
    for again in repeat(loader):
        yield from again
