"""A network of the user's own, in the folder where the command runs: trained, resumed, evaluated, exported."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.abuse import assert_outcome, call
from kit.commands import ROOT, Command, assert_same_bits, final_tensors, metrics, torchrun
from kit.own_networks import write_networks
from kit.speed import slowness
from kit.trained_runs import write_test_images
from kit.user_modules import started_in
from safetensors.torch import save_file
from torchvision.models import resnet18

from distributed import load
from distributed.run.records import read_attempts

pytestmark = pytest.mark.timeout(300)
SMALL = ("--data.name", "generated10", "--data.train_samples", 120, "--data.test_samples", 40, "--global_batch_size", 32,
         "--schedule.name", "constant", "--exact.shards", 0, "--device", "cpu", "--threads", 1)  # fmt: skip
OWN = ("--model.name", "own_networks:make", "--model.options.width", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_networks(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Two epochs on two processes, without a stop."""
    train(folder, *SMALL, *OWN, "--epochs", 2, "--run_dir", folder / "run")
    return folder / "run"


def train(folder: Path, *arguments: object, code: int = 0) -> str:
    with Command(torchrun(2, *arguments), output=folder / "output", cwd=folder) as command:
        assert command.wait() == code, command.text
        return command.text


def alone(folder: Path, *arguments: object, more: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """Run a Python file or module in the folder, with this project on the path but not in the current folder."""
    return subprocess.run(
        [sys.executable, *more, *map(str, arguments)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100 * slowness(), check=False,
    )  # fmt: skip


def test_a_changed_module_is_a_warning(run: Path, tmp_path: Path) -> None:
    """A comment is added to the module between two attempts, and before its results are used: both digests are named."""
    module, resumed = tmp_path / f"{write_networks(tmp_path)}.py", tmp_path / "run"
    before = hashlib.sha256(module.read_bytes()).hexdigest()
    arguments = (*SMALL, *OWN, "--run_dir", resumed)
    assert "has changed since" not in train(tmp_path, *arguments, "--epochs", 1)
    module.write_text(module.read_text() + "# changed\n")
    after = hashlib.sha256(module.read_bytes()).hexdigest()
    text = train(tmp_path, *arguments, "--epochs", 2)
    assert f"{module} has changed since the checkpoint: sha256 {before[:12]} before, {after[:12]} now" in text
    started = [record for record in read_attempts(resumed / "attempts.jsonl") if record.event == "started"]
    assert [record.modules and record.modules["model.name"] for record in started] == [
        {"file": str(module), "sha256": digest} for digest in (before, after)
    ]
    assert_same_bits(resumed, run)
    tensors = final_tensors(run)
    assert tensors["model.conv.weight"].shape == (6, 3, 3, 3)
    assert not torch.equal(tensors["model.norm.running_mean"], torch.zeros(6))
    with started_in(tmp_path):
        third = call("train", *arguments, "--epochs", 3)
        assert (third.code, "has changed since" in third.err) == (0, False), third.err
        assert "has changed since" not in call("evaluate", resumed).err
        module.write_text(module.read_text() + "# changed again\n")
        images = write_test_images(tmp_path / "images", 1)
        for command in (
            ("evaluate", resumed),
            ("predict", resumed, *images),
            ("export", resumed, "--out", tmp_path / "out"),
        ):
            assert f"{module} has changed since training: sha256 {after[:12]} then" in call(*command).err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--model.name", "own_networks:Net", *OWN[2:]],
            "model.name = own_networks:Net: this run was started with own_net",
        ),
        ([*OWN[:3], 7], "model.options.width = 7: this run was started with 6"),
        ([*OWN, "--model.options.drop", "none"], "model.options.drop = none: this run was started with none"),
    ],
)
def test_another_network_or_option_is_refused(run: Path, here: None, changed: list[Any], message: str) -> None:
    found = call("train", *SMALL, *changed, "--epochs", 3, "--run_dir", run)
    assert_outcome(found, message, "a resumed run keeps its experiment", lines=2)


def test_other_commands_load_the_network(run: Path, here: None, tmp_path: Path) -> None:
    evaluated = json.loads(call("evaluate", run, "--json", "--checkpoint", "latest").out)
    logged = metrics(run)[-1]["test"]
    assert (evaluated["model"], evaluated["top1"]) == ("own_networks:make", logged["accuracy"])
    assert evaluated["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    exported = call("export", run, "--out", tmp_path / "export")
    assert exported.code == 0, exported.out + exported.err
    described = json.loads((tmp_path / "export/model.json").read_text())
    assert described["architecture"] == {"name": "own_networks:make", "input_side": None, "options": {"width": 6}}
    assert described["input"]["images"] == ["n", 3, 32, 32]
    reported = call("report", run, "--out", tmp_path / "report.html")
    assert reported.code == 0, reported.out + reported.err
    page = (tmp_path / "report.html").read_text()
    assert "own_networks:make on generated10" in page
    assert "model.name = " not in page, "no section was left out"
    [image, *_] = write_test_images(tmp_path / "images", 1)
    predicted = json.loads(call("predict", run, image, "--json").out)
    assert predicted["images"][0]["top"][0]["class"].startswith("class ")
    assert load(run).image_size == 32


def test_weights_start_another_run(run: Path, here: None, tmp_path: Path) -> None:
    more = ("--data.name", "generated100", *SMALL[2:], *OWN, "--epochs", 1)
    found = call("train", *more, "--run_dir", tmp_path / "tuned", "--init_from", run)
    assert found.code == 0, found.err
    assert "starting from the weights of" in found.err
    assert "head keeps its random initialization" in found.err


def test_a_run_starts_from_weights_of_torchvision(tmp_path: Path) -> None:
    """A file as torchvision's own weights are saved, with 1000 classes, in exact mode."""
    weights = resnet18().state_dict()
    save_file(weights, tmp_path / "resnet18.safetensors")
    arguments = (
        *(
            "--data.name",
            "generated10",
            "--data.train_samples",
            40,
            "--data.test_samples",
            20,
            "--global_batch_size",
            20,
        ),
        *("--model.name", "torchvision.models:resnet18", "--model.options.weights", "none", "--exact.shards", 2),
        *("--schedule.name", "constant", "--device", "cpu", "--threads", 1, "--epochs", 1),
    )
    with started_in(tmp_path):
        found = call(
            "train", *arguments, "--optim.lr", 1e-12, "--run_dir", "run", "--init_from", "resnet18.safetensors"
        )
        assert found.code == 0, found.err
        assert "starting from the weights of resnet18.safetensors; fc keeps its random initialization" in found.err
        assert 'weights = "none"' in Path("run/config.toml").read_text()
        saved = final_tensors(Path("run"))["model.layer4.1.conv2.weight"]
        assert torch.allclose(saved, weights["layer4.1.conv2.weight"], atol=1e-6)
        prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
        save_file(prefixed, "parallel.safetensors")
        refused = call("train", *arguments, "--run_dir", "other", "--init_from", "parallel.safetensors")
    assert_outcome(refused, "102 missing: conv1.weight [64, 3, 7, 7]", "without the prefix module. the names fit")


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_elsewhere_the_module_is_missing(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["image.png"] if command == "predict" else []
    found = call(command, run, *more)
    assert_outcome(
        found,
        "model.name = own_networks:make: there is no module own_networks; run the command in the folder of own_networks.py "
        f"(this is {tmp_path}), or install the package",
    )


def test_a_bad_network_is_reported_once_and_before_training(folder: Path) -> None:
    text = train(folder, *SMALL, "--run_dir", folder / "bad", "--model.name", "own_networks:other_classes", code=1)
    assert text.count("ERROR") == 1, text
    assert "in evaluation the network returns torch.float32 [2, 11]" in text
    assert "exitcode  : 2" in text


def test_console_scripts_find_the_module(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "distributed-train").write_text("import sys\nfrom launch.scripts import train\nsys.exit(train())\n")
    options = (*SMALL, "--model.name", "own_networks:fails", "--run_dir", tmp_path / "run")
    done = alone(folder, tmp_path / "distributed-train", *options)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "model.name = own_networks:fails: the factory failed: ValueError: no way (" in line
    safe = alone(folder, tmp_path / "distributed-train", *options, more=("-P",))
    assert (safe.returncode, "there is no module own_networks" in safe.stderr) == (2, True), safe.stderr
