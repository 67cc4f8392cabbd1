"""Training learns: on generated images, and on real CIFAR if CIFAR_ROOT names it."""

import os
from pathlib import Path
from typing import Any

import pytest
from kit.commands import Command, metrics, torchrun

CIFAR_ROOT = os.environ.get("CIFAR_ROOT")
needs_cifar = pytest.mark.skipif(not CIFAR_ROOT, reason="CIFAR_ROOT is not set")


def trained(tmp_path: Path, epochs: int, *settings: object) -> list[dict[str, Any]]:
    """Return the records of the epochs; the last one has the test accuracy."""
    run = tmp_path / "run"
    quiet = ("--device", "cpu", "--logging.tensorboard", "false", "--evaluation.test_every_epoch", "false")
    arguments = torchrun(2, *settings, "--epochs", epochs, "--run_dir", run, *quiet)
    with Command(arguments, output=tmp_path / "output") as command:
        assert command.wait(400) == 0, command.text[-4000:]
    return [record for record in metrics(run) if record["kind"] == "epoch"]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_generated_images_are_neither_trivial_nor_hopeless(tmp_path: Path) -> None:
    settings = (
        "--data.name", "generated10", "--data.train_samples", 12_000, "--data.test_samples", 2_000,
        "--data.validation_fraction", 0,
    )  # fmt: skip
    first, *_, last = trained(tmp_path, 4, *settings)
    assert first["train_accuracy"] < 0.5
    assert last["test"]["accuracy"] > 0.5


@needs_cifar
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_recipe_learns_from_20000_real_images(tmp_path: Path) -> None:
    """On a narrow network, which trains in seconds. Of CIFAR-100, test_after_training trains on 5,000 images."""
    narrow = ("--model.widths", "[16, 64, 64]", "--evaluation.flip_tta", "false", "--evaluation.shift_tta", 0)
    settings = ("configs/cifar10_fast.toml", "--data.root", CIFAR_ROOT, "--data.validation_fraction", 0.6, *narrow)
    [epoch] = trained(tmp_path, 1, *settings)
    assert epoch["test"]["accuracy"] > 0.5
