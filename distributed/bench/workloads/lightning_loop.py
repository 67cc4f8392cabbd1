"""Lightning's Trainer in bf16-mixed precision and channels last, fed by a DataLoader over tensors with torchvision's
transforms; no logger, progress bar, checkpoint or validation."""

from typing import Any

import lightning.pytorch as pl  # type: ignore[import-not-found, unused-ignore]
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from distributed.bench.measure import StepClock
from distributed.bench.workloads.task import DEVIATION, MEAN, plain_model, plain_sgd, training_images, use_device


class Images(Dataset[tuple[Tensor, int]]):
    """CIFAR-10's training split as uint8 tensors [3, 32, 32], augmented one at a time."""

    def __init__(self, root: str) -> None:
        images, self.labels = training_images(root)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *scale])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class Module(pl.LightningModule):  # type: ignore[misc, unused-ignore]
    """The network and its training step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = plain_model().to(memory_format=torch.channels_last)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        return torch.nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return plain_sgd(self.model)


class Clock(pl.Callback):  # type: ignore[misc, unused-ignore]
    """Counts finished steps and stops the Trainer once the measurement is complete."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.clock.tick():
            trainer.should_stop = True


def run(clock: StepClock, *, root: str, batch: int, device: str, threads: int, workers: int) -> None:
    """Train until the measurement is complete."""
    use_device(device, threads)
    loader = DataLoader(
        Images(root), batch_size=batch, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=device == "cuda", persistent_workers=workers > 0,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, precision="bf16-mixed", benchmark=True,
        max_epochs=-1, max_steps=clock.steps, callbacks=[Clock(clock)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)
