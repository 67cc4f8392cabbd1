"""Draws a run's curves from its metrics.jsonl into a PNG."""

import io
from pathlib import Path
from typing import Any

from distributed.files import replace_bytes
from distributed.run.records import metrics_lines


def draw_curves(metrics_file: Path, target: Path, *, title: str) -> None:
    """Loss, accuracy and learning rate over epochs. Nothing is drawn where no epoch was finished."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = metrics_lines(metrics_file)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not epochs:
        return
    figure, (losses, accuracies, rates) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    x = [line["epoch"] + 1 for line in epochs]
    losses.plot(x, [line["train_loss"] for line in epochs], label="train", marker=".")
    accuracies.plot(x, [100 * line["train_accuracy"] for line in epochs], label="train", marker=".")
    for split in ("validation", "test"):
        points: list[tuple[int, dict[str, Any]]] = [(l["epoch"] + 1, l[split]) for l in epochs if l[split]]  # noqa: E741
        if points:
            at, values = zip(*points, strict=True)
            losses.plot(at, [value["loss"] for value in values], label=split, marker=".")
            accuracies.plot(at, [100 * value["accuracy"] for value in values], label=split, marker=".")
    steps = [line for line in lines if line["kind"] == "train"]
    per_epoch = epochs[0]["step"] / (epochs[0]["epoch"] + 1)
    rates.plot([line["step"] / per_epoch for line in steps], [line["lr"] for line in steps], color="tab:red")
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
