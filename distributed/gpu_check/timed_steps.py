"""Training steps to time: complete steps with their data, and compute alone on one fixed batch."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed.build import build_data, build_engine
from distributed.config import from_command_line
from distributed.config.optim import Sgd
from distributed.data.batch import Batch
from distributed.gpu_check import runs
from distributed.models import alexnet
from distributed.optim.optimizer import Optimizer
from distributed.topology import Topology
from distributed.training.losses import build_losses
from distributed.training.step_function import build_step
from distributed.training.totals import TotalsAccumulator

LR = 1e-3


class Training:
    """Steps as the recipe takes them, on generated images that fill complete batches.

    Args:
        batches: batches per epoch.
        capture: replay steps as CUDA graphs.
        settings: further settings, as in `runs.arguments`.
    """

    def __init__(
        self, device: torch.device, model: str, batch: int, *, batches: int, capture: bool = False, **settings: object
    ) -> None:
        values: dict[str, object] = {
            "model__name": model, "global_batch_size": batch, "data__train_samples": batches * batch,
            "data__test_samples": 10, "data__validation_fraction": 0, "exact__shards": 0, "cuda_graphs": str(capture).lower(),
        }  # fmt: skip
        self.config = from_command_line(runs.arguments(Path("unused"), device, **(values | settings))).config
        self.data = build_data(self.config, Topology(), device)
        self.engine = build_engine(self.config, Topology(), self.data, device)
        self.totals = TotalsAccumulator(device)
        self._train_step = build_step(
            self.config, self.engine, self.totals, device, build_losses(self.config.loss).training
        )
        self.done = 0
        self._batches = self._micro_batches()

    def _micro_batches(self) -> Iterator[list[Batch]]:
        for epoch in count():
            yield from self.data.train_epoch(epoch)

    def next_micro_batches(self) -> list[Batch]:
        """Return the micro-batches of the next step. Timed alone, this is the cost of data."""
        return next(self._batches)

    def step(self) -> None:
        """Take a step on the next batch."""
        self._train_step(self.next_micro_batches(), lr=LR, step=self.done)
        self.done += 1

    def checked_mean_loss(self) -> float:
        """Return the mean loss of all steps so far.

        Raises:
            AssertionError: a loss is not finite, or the number of images does not match the steps.
        """
        totals = self.totals.read()
        assert totals.first_bad_step is None, f"the loss of step {totals.first_bad_step} is not finite"
        assert totals.count == self.done * self.config.global_batch_size, f"{totals.count} images in {self.done} steps"
        return totals.mean_loss


class ComputeAlone:
    """Forward, backward and update on one fixed batch: the cost of a network without this project's data, metrics and checks.

    In bfloat16 and channels last, with torch's batch norm and dropout and a fused SGD. Can be captured.
    """

    def __init__(self, device: torch.device, model: str, batch: int) -> None:
        self.device = device
        self.forward = _plain(model).to(device).to(memory_format=torch.channels_last)
        side = 224 if model == "alexnet" else 32
        images = torch.randn(batch, 3, side, side, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,), device=device)
        self.optimizer = Optimizer(Sgd(), list(self.forward.parameters()))
        self.loss = torch.zeros((), device=device)

    def step(self) -> None:
        """Take a step. `loss` is then the loss before the update."""
        self.optimizer.zero_grad()  # to None: within a graph the backward pass then writes instead of adding
        with torch.autocast(self.device.type, torch.bfloat16):
            logits: Tensor = self.forward(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(LR)
        self.loss.copy_(loss.detach())


def _plain(name: str) -> nn.Module:
    """Return the network with torch's dropout."""
    network = getattr(alexnet, name)(10, 0.5)
    return nn.Sequential(
        network.conv, nn.Flatten(),
        network.fc1, nn.ReLU(), nn.Dropout(0.5),
        network.fc2, nn.ReLU(), nn.Dropout(0.5),
        network.fc3,
    )  # fmt: skip
