"""Training with timm as its train.py does, with the test accuracy and the training time after each epoch."""

from functools import partial
from typing import Any

import numpy as np
import torch
from timm import optim as timm_optim  # type: ignore[import-not-found, unused-ignore]
from timm.data import create_loader  # type: ignore[import-not-found, unused-ignore]
from timm.data.transforms import ToNumpy  # type: ignore[import-not-found, unused-ignore]
from timm.loss import LabelSmoothingCrossEntropy  # type: ignore[import-not-found, unused-ignore]
from timm.scheduler import create_scheduler_v2  # type: ignore[import-not-found, unused-ignore]
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor, nn
from torchvision import transforms

from distributed.bench.epoch_clock import EpochClock
from distributed.bench.measure import StepClock
from distributed.bench.timm_settings import optimizer_arguments, parameter_groups, schedule_arguments
from distributed.bench.workloads.task import use_device
from distributed.bench.workloads.timm_loop import LOG_EVERY, PilImages
from distributed.build import read_data
from distributed.config import TrainConfig, from_command_line
from distributed.config.data import Augment
from distributed.config.functions import Loss
from distributed.config.models import FastAlexNet, Model
from distributed.data.pipeline import DataPipeline
from distributed.data.sources.read import read
from distributed.data.split import validation_mask
from distributed.models import alexnet
from distributed.models.build import build_model, initialize
from distributed.network import whiten_first_layer
from distributed.training.views import Views

_WARMUP = {"use_warmup": True, "warmup_gamma": 9.0, "warmup_power": 1.0}
"""Lets timm's EMA begin as `distributed/optim/ema.py` does: with a decay of at most step / (9 + step)."""


def run(clock: StepClock, *, arguments: list[str], threads: int, workers: int) -> dict[str, Any]:
    """Train to the end of the last epoch. Return the curve."""
    config = from_command_line(arguments).config
    device = use_device(clock.device, threads)
    torch.backends.cudnn.benchmark = True  # as in train.py
    random_seed(config.seed)
    data = read_data(config)
    training, test = _loaders(config, data, device, workers)
    trainer = Trainer(config, _network(config, data).to(device), device, steps_per_epoch=len(training))
    epochs = EpochClock(clock.device)
    for epoch in range(config.epochs):
        epochs.start()
        trainer.train_epoch(epoch, training, epochs)
        epochs.end_epoch(trainer.accuracy(test))
    return {"curve": epochs.curve}


class Trainer:
    """`train_one_epoch` and `validate` of train.py, with what they use."""

    def __init__(self, config: TrainConfig, model: nn.Module, device: torch.device, *, steps_per_epoch: int) -> None:
        self.config, self.device = config, device
        self.model = model.to(memory_format=self._memory_format)
        optim, named = config.optim.model_dump(), {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = parameter_groups(optim, {name: parameter.dim() for name, parameter in named.items()})
        tensors = [group | {"params": [named[name] for name in group["params"]]} for group in groups]
        self.optimizer = timm_optim.create_optimizer_v2(tensors, lr=config.peak_lr, **optimizer_arguments(optim))
        self.scheduler, _ = create_scheduler_v2(self.optimizer, **schedule_arguments(config, steps_per_epoch))
        decay = config.optim.ema_decay
        self.ema = ModelEmaV3(model, decay=decay, **_WARMUP) if decay else None
        assert isinstance(config.loss, Loss)
        smoothing = config.loss.label_smoothing
        self.loss_fn = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()

    def train_epoch(self, epoch: int, loader: Any, epochs: EpochClock) -> None:
        """Train on each batch once."""
        self.model.train()
        updates = epoch * len(loader)
        for images, labels in loader:
            loss = self.loss_fn(self._logits(self.model, images), labels)
            loss.backward()
            if self.config.optim.max_grad_norm:
                dispatch_clip_grad(self.model.parameters(), self.config.optim.max_grad_norm)
            self.optimizer.step()
            updates += 1
            self.optimizer.zero_grad()
            if self.ema:
                self.ema.update(self.model, step=updates + 1)  # its decay lags one step behind its argument
            if updates % LOG_EVERY == 0:
                loss.item()
            self.scheduler.step_update(num_updates=updates)
            epochs.step()
        self.scheduler.step(epoch + 1)

    @torch.no_grad()
    def accuracy(self, loader: Any) -> float:
        """Return the accuracy of the weights, or of their moving average, over the views that the config asks for."""
        model, views = self.ema.module if self.ema else self.model, Views.of(self.config.evaluation)
        model.eval()
        predict = partial(self._logits, model)
        right = [(views.average(predict, images).argmax(1) == labels).sum() for images, labels in loader]
        return int(torch.stack(right).sum()) / len(loader.dataset)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self._memory_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            logits: Tensor = model(images)
        return logits.float()

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.channels_last else torch.contiguous_format


def _network(config: TrainConfig, data: DataPipeline) -> nn.Module:
    """Return the config's network with its initial weights, built of torch's layers."""
    section = config.model
    if isinstance(section, FastAlexNet):
        model = build_model(section, num_classes=data.num_classes, seed=config.seed)
        if section.whitening:
            whiten_first_layer(model, data)
        return model
    assert isinstance(section, Model)
    plain: nn.Module = getattr(alexnet, section.name)(data.num_classes, section.dropout)
    initialize(plain, seed=config.seed, init=section.init)
    return plain


def _loaders(config: TrainConfig, data: DataPipeline, device: torch.device, workers: int) -> tuple[Any, Any]:
    """Return timm's loaders of the training split and of the test split, which normalize on the device."""
    images = read(config.data, config.decoded_side)
    held_out = validation_mask(
        images.train.labels, fraction=config.data.validation_fraction, seed=config.data.split_seed
    )
    ids = np.flatnonzero(~held_out)
    training = PilImages(images.train.images[ids], images.train.labels[ids].tolist())
    test = PilImages(images.test.images, images.test.labels.tolist())
    mean, deviation = (tuple(values.tolist()) for values in (data.normalizer.mean, data.normalizer.deviation))
    options = {
        "input_size": (3, *images.train.images.shape[1:3]), "mean": mean, "std": deviation, "num_workers": workers,
        "pin_memory": device.type == "cuda", "device": device,
    }  # fmt: skip
    loaders = (
        create_loader(training, batch_size=config.global_batch_size, is_training=True, **options),
        create_loader(test, batch_size=config.evaluation.batch_size, **options),
    )
    # Instead of timm's resizing and color jitter.
    training.transform = transforms.Compose([*_augmentation(config.data.augment, training.side), ToNumpy()])
    test.transform = ToNumpy()
    return loaders


def _augmentation(augment: Augment, side: int) -> list[Any]:
    found: list[Any] = []
    if augment.crop:
        mode = "reflect" if augment.crop_padding == "reflect" else "constant"
        found.append(transforms.RandomCrop(side, padding=augment.crop, padding_mode=mode))
    return [*found, transforms.RandomHorizontalFlip()] if augment.flip else found
