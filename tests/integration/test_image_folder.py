"""Training on an image folder with two processes, images on the device or in host memory, then evaluating."""

import json
from pathlib import Path

import numpy as np
import pytest
from kit.commands import ROOT, Command, assert_same_bits, metrics, torchrun
from PIL import Image

from integration.test_command_line import python, run

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
    for placement in ("host", "device"):
        folder = tmp_path / placement
        arguments = (*SETTINGS, "--data.root", root, "--data.placement", placement, "--run_dir", folder)
        with Command(torchrun(2, *arguments), output=tmp_path / f"{placement}.txt", cwd=ROOT) as command:
            assert command.wait(100) == 0, command.text
        message = command.text.count("decoding train images: 24 images\n")
        assert message == (1 if placement == "host" else 0), "by one process, once"
    assert_same_bits(tmp_path / "host", tmp_path / "device")
    state = json.loads((tmp_path / "host" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["classes"] == ["blue", "red"]
    assert [len(state["normalization"][name]) for name in ("mean", "deviation")] == [3, 3]
    evaluated = run(python(tmp_path / "host", "--split", "test", module="distributed.evaluate"))
    test = metrics(tmp_path / "host")[-1]["test"]
    assert "test split (8 images)" in evaluated.stdout
    assert f"loss {test['loss']:.4f}, top-1 {test['accuracy']:.2%}" in evaluated.stdout
    root.rename(root.with_name("moved"))
    moved = run(python(tmp_path / "host", "--data.root", root.with_name("moved"), module="distributed.evaluate"))
    assert moved.stdout == evaluated.stdout


def test_a_broken_image_ends_with_exit_code_2(root: Path, tmp_path: Path) -> None:
    file = root / "train" / "red" / "1.png"
    file.write_bytes(file.read_bytes()[:500])
    result = run(python(*SETTINGS, "--data.root", root, "--run_dir", tmp_path / "run"))
    assert result.returncode == 2
    assert f"{file}: broken" in result.stderr
    assert "Traceback" not in result.stderr
