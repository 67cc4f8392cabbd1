"""What is measured, each in a process of its own: `python -m distributed.bench.contenders NAME JSON_ARGUMENTS`.

Prints, on rank 0, one JSON line: the clock (CLOCK_MONOTONIC, the same for all processes) after every step, and the most
memory it held, MiB.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def seed_loop(root: str, steps: int, threads: int) -> list[float]:
    """The seeds' plain loop: PIL images, torchvision transforms, a DataLoader with two workers, float32."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from distributed.data import cifar

    source = cifar.read("cifar10", Path(root), "train")
    pictures = [Image.fromarray(image) for image in source.images]
    change = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ]
    )

    class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return change(pictures[index]), int(source.labels[index])

    torch.set_num_threads(threads)
    model = _plain_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=128, shuffle=True, num_workers=2)
    clock = []
    for images, labels in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # the seeds add up their losses so
        clock.append(time.monotonic())
        if len(clock) == steps:
            break
    return clock


def compute_alone(steps: int, threads: int) -> list[float]:
    """Forward, backward and update on one fixed batch: bfloat16, channels last, torch's own BatchNorm2d and Dropout."""
    import torch

    torch.set_num_threads(threads)
    model = _plain_model().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))
    clock = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clock.append(time.monotonic())
    return clock


def ours(steps: int, arguments: list[str]) -> list[float]:
    """`train(config)` as `python -m distributed.train ARGUMENTS` runs it, stopped after so many steps."""
    from distributed import logs
    from distributed.config import load
    from distributed.recipe import train
    from distributed.topology import Topology

    class Clock:
        """A stop source: asked after every step, so it can read the clock there."""

        def __init__(self) -> None:
            self.clock: list[float] = []

        def requested(self) -> str | None:
            self.clock.append(time.monotonic())
            return "the end of the measurement" if len(self.clock) >= steps else None

    config, _ = load(arguments)
    logs.terminal_logs(Topology.from_environment().rank, level="WARNING")
    clock = Clock()
    train(config, stop=clock)
    return clock.clock


def process_group_alone() -> list[float]:
    """`import torch` and a process group, the least that any distributed program starts with."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))
    return [time.monotonic()]


def local_response_norm(*, layer: str, precision: str, steps: int) -> list[float]:
    """Forward and backward of one layer. torch's knows no bfloat16 on a CPU, so that the cast to float32 and back is its
    part there, as it would be in a network."""
    import torch
    from torch import nn

    from distributed.models.local_response_norm import LocalResponseNorm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, precision)
    images = torch.randn(128, 96, 28, 28, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(images)
    images.requires_grad_()
    norm: Any = (LocalResponseNorm if layer == "ours" else nn.LocalResponseNorm)(5, alpha=1e-4, beta=0.75, k=2.0)
    clock = []
    for _ in range(steps):
        images.grad = None
        norm(images if layer == "ours" else images.float()).to(dtype).backward(grad)
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.monotonic())
    return clock


def _plain_model() -> Any:
    """Improved AlexNet of torch's own layers."""
    from torch import nn

    from distributed.models.alexnet import improved_alexnet

    def classifier() -> nn.Sequential:
        hidden = [nn.Linear(1024, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 128), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))

    return nn.Sequential(improved_alexnet(10, 0.5).conv, classifier())


def main() -> None:
    from distributed.topology import Topology

    contender = {f.__name__: f for f in (seed_loop, compute_alone, ours, process_group_alone, local_response_norm)}[
        sys.argv[1]
    ]
    clock = contender(**json.loads(sys.argv[2]))
    if Topology.from_environment().is_main:
        print("CLOCK", json.dumps([clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]), flush=True)


if __name__ == "__main__":
    main()
