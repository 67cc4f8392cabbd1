"""Analyses a checkpoint and its data: test results, most confident mistakes, first-layer filters, augmented images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distributed.build import build_data, build_engine
from distributed.checkpoint.tensor_file import read_tensors
from distributed.checkpoint.warm_start import evaluation_weights
from distributed.comm.process_group import choose_device
from distributed.config import TrainConfig
from distributed.data.batch import Batch
from distributed.data.checks import check_channels, check_evaluated
from distributed.data.pipeline import DataPipeline
from distributed.data.sources.image_file import png_of
from distributed.errors import InputError
from distributed.inference.confusion import MAX_CLASSES, ConfusionMatrix, Counts
from distributed.inference.saved_run import (
    Normalization,
    check_complete,
    for_device,
    read_content,
    warn_about_changes,
)
from distributed.run.folder import RunFolder
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic
from distributed.training.functions import build_functions
from distributed.training.precision import for_evaluation
from distributed.training.steps import evaluate
from distributed.training.totals import SplitTotals
from distributed.training.views import Views

_FILTERS = 96
"""The most filters of the first convolution that are shown."""


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image as PNG; `probability` is that of the predicted class."""

    png: bytes
    true: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Findings:
    """Results of a checkpoint on the test split. counts: None with more than `MAX_CLASSES` classes."""

    totals: SplitTotals
    counts: Counts | None
    class_names: list[str]
    mistakes: list[Mistake]


@dataclass(frozen=True)
class _Wrong:
    """A wrong prediction: probability, class indices, and the normalized image [channels, height, width]."""

    probability: float
    true: int
    predicted: int
    image: Tensor


class _MostConfidentMistakes:
    """Keeps the wrong predictions with the highest probability. An observer for `evaluate` in a single process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[_Wrong] = []

    def __call__(self, logits: Tensor, batch: Batch) -> None:
        probabilities, predicted = logits.softmax(1).max(1)
        wrong = torch.where(predicted != batch.labels, probabilities, -1.0)
        for index in wrong.topk(min(self.count, len(wrong))).indices.tolist():
            if wrong[index] >= 0:
                image = batch.images[index].float().cpu()
                self.found.append(_Wrong(float(wrong[index]), int(batch.labels[index]), int(predicted[index]), image))
        self.found = sorted(self.found, key=lambda mistake: -mistake.probability)[: self.count]


class Analysis:
    """Analyses a run's data and checkpoints; the data is read once.

    Raises:
        InputError: the data is missing.
    """

    def __init__(self, run: RunFolder, config: TrainConfig) -> None:
        self.topology = Topology()
        self.device = choose_device("auto", self.topology)
        self.config = for_evaluation(for_device(config, "auto", run.newest_state()), self.device)
        make_deterministic(self.device, precision=self.config.precision)
        self.data: DataPipeline = build_data(self.config, self.topology, self.device)
        self.normalization = Normalization(**self.data.metadata()["normalization"])

    def augmented(self, count: int) -> list[bytes]:
        """Return the first training images of the first epoch as PNG, after augmentation."""
        images = next(self.data.train_epoch(0))[0].images[:count]
        return [as_png(image, self.normalization) for image in images.float().cpu()]

    def findings(self, checkpoint: Path, *, mistakes: int) -> Findings:
        """Evaluate a checkpoint on the test split and keep its most confident mistakes.

        Raises:
            InputError: the checkpoint is damaged, or its network or classes do not match the run's config and data.
        """
        check_complete(checkpoint)
        content = read_content(checkpoint)
        warn_about_changes(content, self.config.import_paths)
        check_channels(content, self.config, self.data)
        check_evaluated(content, self.config, self.data, "test")
        self.normalization = Normalization(**content["normalization"])
        self.data.normalize_by(*self.normalization)
        engine = build_engine(self.config, self.topology, self.data, self.device)
        try:
            engine.load_state(read_tensors(checkpoint))
        except ValueError as error:
            raise InputError(f"{checkpoint}: {error}") from None
        few = self.data.num_classes <= MAX_CLASSES
        confusion = ConfusionMatrix(self.data.num_classes, self.device) if few else None
        confident = _MostConfidentMistakes(mistakes)
        views = Views.of(self.config.evaluation)
        functions = build_functions(self.config, self.topology, self.data, self.device)
        totals = evaluate(
            engine, self.data, "test", loss=functions.loss.evaluation, metrics=functions.metrics, views=views,
            device=self.device, observers=[confusion, confident] if confusion else [confident],
        )  # fmt: skip
        names = content["classes"]
        found = [
            Mistake(as_png(each.image, self.normalization), names[each.true], names[each.predicted], each.probability)
            for each in confident.found
        ]
        return Findings(totals, confusion.read() if confusion else None, names, found)


def first_filters(checkpoint: Path) -> list[bytes] | None:
    """Return the first convolution's filters as PNG: mid-grey for a weight of 0, each scaled to its own largest weight.

    None if no convolution takes images of three channels or of one.

    Raises:
        InputError: the checkpoint is damaged.
    """
    check_complete(checkpoint)
    kernels = [tensor for tensor in evaluation_weights(checkpoint).values() if tensor.dim() == 4]
    filters = next((kernel for channels in (3, 1) for kernel in kernels if kernel.shape[1] == channels), None)
    if filters is None:
        return None
    scaled = filters[:_FILTERS] / filters[:_FILTERS].abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return [png_of((0.5 + 0.5 * each).expand(3, -1, -1)) for each in scaled]


def as_png(image: Tensor, normalization: Normalization) -> bytes:
    """Undo the normalization of an image [channels, height, width] and return it as PNG."""
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    return png_of((image * deviation + mean).expand(3, -1, -1))
