"""A user's own arrays: trained, killed, resumed on other ranks, then evaluated, predicted, exported and reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from kit.abuse import assert_outcome, call
from kit.arrays import write_arrays, write_module
from kit.commands import Command, assert_same_bits, attempts, final_tensors, kill, metrics, torchrun
from kit.user_modules import started_in
from PIL import Image

pytestmark = pytest.mark.timeout(300)
SETTINGS = (
    "--data.name", "arrays", "--model.name", "grey:make", "--model.input_side", 20, "--global_batch_size", 24,
    "--schedule.name", "constant", "--data.augment.mixup", 0.2, "--precision", "float32", "--device", "cpu", "--threads", 1,
    "--checkpoint.every_steps", 2, "--exact.shards", 8, "--logging.every_steps", 1,
)  # fmt: skip
TRAINED = (*SETTINGS, "--data.root", "arrays", "--epochs", 3)
GREY = """\
from torch import nn


def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(72, num_classes),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with arrays of 14 x 18 grey pixels, a module with a network for them, and one with data."""
    folder = tmp_path_factory.mktemp("own")
    write_arrays(folder / "arrays", (14, 18), train=160, test=40, classes=5)
    write_module(folder)
    (folder / "grey.py").write_text(GREY)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The run on one process, without a disturbance."""
    with started_in(folder):
        found = call("train", *TRAINED, "--run_dir", "run")
    assert found.code == 0, found.err
    return folder / "run"


def saves(run: Path) -> int:
    file = run / "digests.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_killed_on_2_and_resumed_on_1_has_the_same_bits(folder: Path, run: Path, here: None) -> None:
    killed = folder / "killed"
    with Command(torchrun(2, *TRAINED, "--run_dir", killed), output=folder / "killed.out", cwd=folder) as command:
        command.wait_for(lambda: saves(killed) >= 2, what="two saves")
        kill(command.ranks()[-1])
        assert command.wait() != 0
    resumed = call("train", *TRAINED, "--run_dir", killed)
    assert resumed.code == 0, resumed.err
    assert [attempt["world_size"] for attempt in attempts(killed, "started")] == [2, 1]
    assert_same_bits(killed, run)
    assert final_tensors(run)["model.0.weight"].shape == (8, 1, 3, 3)


def test_a_resume_with_other_arrays_is_refused(folder: Path, run: Path, here: None, tmp_path: Path) -> None:
    other = write_arrays(tmp_path / "other", (14, 18), train=160, test=40, classes=5)
    images = np.load(other / "train_images.npy")
    images[0, 0, 0] ^= 1
    np.save(other / "train_images.npy", images)
    found = call("train", *SETTINGS, "--data.root", other, "--epochs", 4, "--run_dir", run)
    assert_outcome(found, "the digest of the training images is", "point --data.root at the files", lines=2)


def test_other_commands_read_the_data(run: Path, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = json.loads(call("evaluate", run, "--json", "--checkpoint", "latest").out)
    logged = metrics(run)[-1]["test"]
    assert (evaluated["data"], evaluated["top1"]) == ("arrays", logged["accuracy"])
    with monkeypatch.context() as patched:
        patched.setattr("distributed.inference.confusion.MAX_CLASSES", 4)
        refused = call("evaluate", run, "--confusion", tmp_path / "confusion.png")
        assert_outcome(refused, "--confusion: 5 classes are too many for a matrix; leave it out")
        many = json.loads(call("evaluate", run, "--json", "--checkpoint", "latest").out)
        assert call("report", run, "--out", tmp_path / "many.html").code == 0
    assert "top-1 accuracy" in (tmp_path / "many.html").read_text()
    assert many == evaluated | {"classes": [], "confusion": None, "picture": None}
    exported = call("export", run, "--out", tmp_path / "export")
    assert exported.code == 0, exported.out + exported.err
    assert "compared on 40 test images" in exported.out
    described = json.loads((tmp_path / "export/model.json").read_text())
    grey = "float32, grey, pixels in [0, 1]"
    assert described["input"] == {"images": ["n", 1, 20, 20], "type": grey, "scaled_from": [14, 18]}
    write_arrays(tmp_path / "colours", (14, 18, 3), train=160, test=40, classes=5)
    refused = call("export", run, "--out", tmp_path / "export", "--data.root", tmp_path / "colours")
    assert_outcome(refused, "the images have 3 channels here, but had 1 in training")
    write_arrays(tmp_path / "larger", (20, 20), train=160, test=40, classes=5)
    refused = call("export", run, "--out", tmp_path / "export", "--data.root", tmp_path / "larger")
    assert_outcome(refused, "the images have 20 x 20 pixels here, but had 14 x 18 in training")
    reported = call("report", run, "--out", tmp_path / "report.html")
    assert reported.code == 0, reported.out + reported.err
    page = (tmp_path / "report.html").read_text()
    assert "grey:make on arrays" in page
    for absent in ("data.name = ", "model.name = ", "has no convolution"):
        assert absent not in page, "no section was left out"
    Image.fromarray(np.load("arrays/test_images.npy")[3]).save(tmp_path / "image.png")
    picture = ("--picture", tmp_path / "picture.png")
    predicted = json.loads(call("predict", run, tmp_path / "image.png", "--json", *picture).out)
    assert predicted["images"][0]["top"][0]["class"].startswith("class ")
    assert call("compare", run, run).code == 0


def test_data_by_an_import_path_trains_a_built_in_network(folder: Path, tmp_path: Path) -> None:
    settings = ("--data.name", "own_data:arrays", "--data.options.side", 10, "--device", "cpu", "--epochs", 1)
    run = tmp_path / "run"
    with started_in(folder):
        found = call("train", *settings, "--threads", 1, "--run_dir", run)
        assert found.code == 0, found.err
        evaluated = json.loads(call("evaluate", run, "--json").out)
        assert (evaluated["data"], evaluated["images"]) == ("own_data:arrays", 16)
        found = call("train", *settings, "--data.options.seed", 1, "--threads", 1, "--run_dir", run)
        assert_outcome(
            found, "data.options.seed = 1: this run was started with none", "a resumed run keeps its", lines=2
        )
        exported = call("export", run, "--format", "onnx", "--out", tmp_path / "export")
        assert exported.code == 0, exported.out + exported.err
        refused = call("evaluate", run, "--data.root", folder / "arrays")
        assert_outcome(refused, "this run used data.name = own_data:arrays; leave it out")
    with started_in(tmp_path):
        missing = call("evaluate", run)
    assert_outcome(
        missing, "data.name = own_data:arrays: there is no module own_data; run the command in the folder of"
    )
