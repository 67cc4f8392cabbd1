"""A training loop with accelerate, as in its examples: `Accelerator.prepare`, bf16 mixed precision, the data path of the
references' loop; channels last."""

import torch
from accelerate import Accelerator  # type: ignore[import-not-found, unused-ignore]
from torch.utils.data import DataLoader

from distributed.bench.measure import StepClock
from distributed.bench.workloads.reference_loop import PilImages, epochs
from distributed.bench.workloads.task import plain_model, plain_sgd, use_device


def run(clock: StepClock, *, root: str, batch: int, device: str, threads: int, workers: int) -> None:
    """Train until the measurement is complete."""
    use_device(device, threads)
    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    plain = plain_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    data = DataLoader(
        PilImages(root), batch_size=batch, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=device == "cuda", persistent_workers=workers > 0,
    )  # fmt: skip
    model, optimizer, loader = accelerator.prepare(plain, plain_sgd(plain), data)
    for images, labels in epochs(loader):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        accelerator.backward(loss)
        optimizer.step()
        if clock.tick():
            return
