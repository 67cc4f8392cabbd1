"""The training loop of the two reference implementations: PIL images, torchvision transforms, a DataLoader with two workers,
float32."""

from collections.abc import Iterator
from itertools import repeat

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from distributed.bench.measure import StepClock
from distributed.bench.workloads.task import DEVIATION, MEAN, plain_model, plain_sgd, training_images, use_device


class PilImages(Dataset[tuple[Tensor, int]]):
    """CIFAR-10's training split as PIL images, augmented one at a time."""

    def __init__(self, root: str) -> None:
        images, self.labels = training_images(root)
        self.images = [Image.fromarray(image) for image in images]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, DEVIATION),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def run(clock: StepClock, *, root: str, batch: int, device: str, threads: int) -> None:
    """Train until the measurement is complete."""
    target = use_device(device, threads)
    model = plain_model().to(target)
    optimizer = plain_sgd(model)
    loader = DataLoader(PilImages(root), batch_size=batch, shuffle=True, num_workers=2, drop_last=True)
    for images, labels in epochs(loader):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images.to(target)), labels.to(target))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # the references add up their losses like this
        if clock.tick():
            return


def epochs(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[list[Tensor]]:
    """Yield the loader's batches, epoch after epoch."""
    for epoch in repeat(loader):
        yield from epoch
