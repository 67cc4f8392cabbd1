"""The seeds' plain loop: PIL images, torchvision transforms, a DataLoader with two workers, float32."""

from collections.abc import Iterator
from itertools import repeat

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from distributed.bench.clock import StepClock
from distributed.bench.workload import DEVIATION, MEAN, plain_model, plain_sgd, prepare, training_images


class Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images, augmented one at a time."""

    def __init__(self, root: str) -> None:
        images, self.labels = training_images(root)
        self.pictures = [Image.fromarray(image) for image in images]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, DEVIATION),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def run(clock: StepClock, *, root: str, batch: int, device: str, threads: int) -> None:
    """Train until the clock has enough."""
    place = prepare(device, threads)
    # The seeds compute in float32; TF32 would give convolutions 10 of its 23 bits of mantissa.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = plain_model().to(place)
    optimizer = plain_sgd(model)
    loader = DataLoader(Pictures(root), batch_size=batch, shuffle=True, num_workers=2, drop_last=True)
    for images, labels in epochs(loader):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images.to(place)), labels.to(place))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # the seeds add up their losses so
        if clock.tick():
            return


def epochs(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[list[Tensor]]:
    """The loader's batches, epoch after epoch."""
    for again in repeat(loader):
        yield from again
