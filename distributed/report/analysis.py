"""What a checkpoint shows of itself: its results on the test images, its worst mistakes, its first layer; and its data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distributed.build import build_data, build_engine
from distributed.checkpoint.snapshot import load_checkpoint
from distributed.checkpoint.warm_start import evaluation_weights
from distributed.comm.process_group import choose_device
from distributed.config import TrainConfig
from distributed.data.batch import Batch
from distributed.data.checks import check_evaluated
from distributed.data.pipeline import DataPipeline
from distributed.data.sources.image_file import png_of
from distributed.errors import InputError
from distributed.inference.confusion import ConfusionSums, Counts
from distributed.inference.saved_run import (
    Normalization,
    check_complete,
    for_device,
    read_class_names,
    read_content,
    read_normalization,
)
from distributed.topology import Topology
from distributed.training.determinism import make_deterministic
from distributed.training.steps import evaluate
from distributed.training.totals import Totals


@dataclass(frozen=True)
class Mistake:
    """A test image as PNG that was taken, with a probability, for another class than its own."""

    png: bytes
    true: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Findings:
    """Of a checkpoint on the test split."""

    totals: Totals
    counts: Counts
    classes: list[str]
    mistakes: list[Mistake]


class _Worst:
    """Keeps the wrong answers of the highest probability: an observer for `evaluate`, in a single process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[tuple[float, int, int, Tensor]] = []

    def __call__(self, logits: Tensor, batch: Batch) -> None:
        probabilities, predicted = logits.softmax(1).max(1)
        wrong = torch.where(predicted != batch.labels, probabilities, -1.0)
        for place in wrong.topk(min(self.count, len(wrong))).indices.tolist():
            if wrong[place] >= 0:
                facts = float(wrong[place]), int(batch.labels[place]), int(predicted[place])
                self.found.append((*facts, batch.images[place].float().cpu()))
        self.found = sorted(self.found, key=lambda one: -one[0])[: self.count]


class Checked:
    """A run's data and, where there is one, its checkpoint, read once for all that is shown of them.

    Raises:
        InputError: the data is not there.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.topology = for_device(config, "auto"), Topology()
        self.device = choose_device("auto", self.topology)
        make_deterministic(self.device, precision=self.config.precision)
        self.data: DataPipeline = build_data(self.config, self.topology, self.device)
        self.normalization = Normalization(**self.data.metadata()["normalization"])

    def augmented(self, count: int) -> list[bytes]:
        """The first training images of the first epoch as PNG, changed as the network was given them."""
        images = next(self.data.train_epoch(0))[0].images[:count]
        return [as_png(image, self.normalization) for image in images.float().cpu()]

    def findings(self, checkpoint: Path, *, mistakes: int) -> Findings:
        """What `evaluate` finds, and the most confidently wrong answers.

        Raises:
            InputError: the checkpoint is damaged, of another network, or of other classes than the data.
        """
        check_complete(checkpoint)
        content = read_content(checkpoint)
        check_evaluated(content, self.config, self.data, "test")
        engine = build_engine(self.config, self.topology, self.data, self.device)
        try:
            load_checkpoint(checkpoint, engine)
        except ValueError as error:
            raise InputError(f"{checkpoint}: {error}") from None
        confusion, worst = ConfusionSums(self.data.num_classes, self.device), _Worst(mistakes)
        flip_tta = self.config.evaluation.flip_tta
        totals = evaluate(
            engine, self.data, "test", flip_tta=flip_tta, device=self.device, observers=[confusion, worst]
        )
        names, normalization = read_class_names(content, self.config), read_normalization(content) or self.normalization
        found = [
            Mistake(as_png(image, normalization), names[true], names[predicted], probability)
            for probability, true, predicted, image in worst.found
        ]
        return Findings(totals, confusion.read(), names, found)


def first_filters(checkpoint: Path, *, most: int = 96) -> list[bytes] | None:
    """The first convolution's filters as PNG, mid-grey where a weight is 0, each scaled to its own largest weight; None where
    no convolution looks at three channels.

    Raises:
        InputError: the checkpoint is damaged.
    """
    check_complete(checkpoint)
    filters = next((t for t in evaluation_weights(checkpoint).values() if t.dim() == 4 and t.shape[1] == 3), None)
    if filters is None:
        return None
    scaled = filters[:most] / filters[:most].abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return [png_of(0.5 + 0.5 * one) for one in scaled]


def as_png(image: Tensor, normalization: Normalization) -> bytes:
    """A normalized image [3, h, w] as it looked before."""
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    return png_of(image * deviation + mean)
