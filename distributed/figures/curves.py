"""Draws a run's curves from its metrics.jsonl into a PNG."""

import io
from pathlib import Path

from distributed.files import replace_bytes
from distributed.run.metrics_file import SplitRecord, read_epochs, read_steps


def draw_curves(metrics_file: Path, target: Path, *, title: str) -> None:
    """Loss, accuracy and learning rate over epochs. Nothing is drawn where no epoch was finished."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    epochs = read_epochs(metrics_file)
    if not epochs:
        return
    figure, (losses, accuracies, rates) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    x = [line.epoch + 1 for line in epochs]
    losses.plot(x, [line.train_loss for line in epochs], label="train", marker=".")
    accuracies.plot(x, [_percent(line.train_accuracy) for line in epochs], label="train", marker=".")
    for split in ("validation", "test"):
        points: list[tuple[int, SplitRecord]] = [
            (line.epoch + 1, measured) for line in epochs if (measured := getattr(line, split))
        ]
        if points:
            at, values = zip(*points, strict=True)
            losses.plot(at, [value.loss for value in values], label=split, marker=".")
            accuracies.plot(at, [_percent(value.accuracy) for value in values], label=split, marker=".")
    steps = read_steps(metrics_file)
    per_epoch = epochs[0].step / (epochs[0].epoch + 1)
    rates.plot([line.step / per_epoch for line in steps], [line.lr for line in steps], color="tab:red")
    for axes, label in ((losses, "loss"), (accuracies, "top-1 accuracy, %"), (rates, "learning rate")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    losses.legend()
    accuracies.legend()
    figure.suptitle(title)
    content = io.BytesIO()
    try:
        figure.savefig(content, format="png", dpi=110)
    finally:
        plt.close(figure)
    replace_bytes(target, content.getvalue())


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
