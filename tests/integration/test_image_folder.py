"""Training on an image folder with two processes, images on the device or in host memory, then evaluating."""

import json
from pathlib import Path

import numpy as np
import pytest
from kit.abuse import call
from kit.commands import ROOT, Command, assert_same_bits, metrics, torchrun
from PIL import Image

SETTINGS = (
    *("--data.name", "image_folder", "--epochs", 1, "--global_batch_size", 8, "--logging.every_steps", 1),
    *("--data.validation_fraction", 0.25, "--precision", "float32", "--data.augment.crop", 2, "--device", "cpu"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, red and blue, with 12 training and 4 test images each, of odd sizes."""
    drawn = np.random.default_rng(1)
    for split, count in (("train", 12), ("test", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = drawn.integers(0, 80, (40 + index, 50, 3)).astype(np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    return tmp_path / "pictures"


@pytest.mark.timeout(240)
def test_placement_does_not_change_training_and_evaluation(root: Path, tmp_path: Path) -> None:
    on_host, on_device = (
        (*SETTINGS, "--data.root", root, "--data.placement", placement, "--run_dir", tmp_path / placement)
        for placement in ("host", "device")
    )
    with Command(torchrun(2, *on_host), output=tmp_path / "host.txt", cwd=ROOT) as command:
        assert command.wait(100) == 0, command.text
    assert command.text.count("decoding train images: 24 images\n") == 1, "by one process"
    alone = call("train", *on_device)
    assert (alone.code, "decoding train images" in alone.err) == (0, False), alone.err
    assert_same_bits(tmp_path / "host", tmp_path / "device")
    state = json.loads((tmp_path / "host" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["classes"] == ["blue", "red"]
    assert [len(state["normalization"][name]) for name in ("mean", "deviation")] == [3, 3]
    evaluated = call("evaluate", tmp_path / "host", "--split", "test")
    test = metrics(tmp_path / "host")[-1]["test"]
    assert "test split (8 images)" in evaluated.out
    assert f"loss {test['loss']:.4f}, top-1 {test['accuracy']:.2%}" in evaluated.out
    root.rename(root.with_name("moved"))
    moved = call("evaluate", tmp_path / "host", "--data.root", root.with_name("moved"))
    assert moved.out == evaluated.out
