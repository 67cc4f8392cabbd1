"""`train` with objects, from scripts and cells as users write them: killed, resumed, refused, as in the document."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from kit.abuse import assert_outcome, call
from kit.commands import ROOT, Command, assert_same_bits, attempts, status
from kit.small_runs import small_config
from kit.speed import slowness
from kit.user_modules import forget, started_in

from distributed.recipe import train

pytestmark = pytest.mark.timeout(300)
[EXAMPLE] = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/your-own.md").read_text().partition("## From Python")[2], re.DOTALL
)
SCRIPT = """
import sys
import numpy as np
import torch
from torch import nn
from distributed import load_config
from distributed.errors import InputError
from distributed.recipe import train

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.drop(self.norm(self.conv(images)).relu().mean((2, 3))))

draws = np.random.default_rng(0)
data = {f"{split}_labels": draws.integers(3, size=count) for split, count in (("train", 130), ("test", 50))}
data |= {f"{split}_images": draws.integers(256, size=(len(data[f"{split}_labels"]), 9, 9), dtype=np.uint8)
         for split in ("train", "test")}
settings = dict(epochs=3, global_batch_size=16, device="cpu", threads=1, schedule={"name": "constant"},
                checkpoint={"every_steps": 3}, data={"validation_fraction": 0.2})
run_dir, *slow = sys.argv[1:]

class Slow:
    on_every_rank = True
    def log_step(self, metrics):
        import time
        time.sleep(0.2)  # time to be killed
    def log_epoch(self, metrics): ...
    def close(self): ...

try:
    settings["logging"] = {"every_steps": 1}
    result = train(load_config(run_dir=run_dir, **settings), model=Net, data=data, sinks=[Slow()] if slow else [])
except InputError as error:
    sys.exit(error.report())
print(f"step {result.step}, {len(result.history)} epochs, weights {result.network.head.weight.sum():.6f}")
"""


def torchrun(ranks: int, *arguments: object) -> list[str]:
    options = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--nproc_per_node={ranks}")
    return [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)]


def alone(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100 * slowness(), check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    (folder / "own.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The script in one process, without a stop."""
    done = alone(folder, "own.py", "runs/alone")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"step 21, 3 epochs, weights \S+\n", done.stdout)
    return folder / "runs/alone"


def test_a_script_killed_on_two_resumes_on_three(folder: Path, run: Path) -> None:
    killed = folder / "runs/killed"
    with Command(torchrun(2, "own.py", killed, "slow"), output=folder / "first", cwd=folder) as command:
        command.wait_for(lambda: len(list(killed.glob("checkpoints/step-*"))) > 1, what="two checkpoints")
    assert status(killed)["status"] == "running"
    with Command(torchrun(3, "own.py", killed), output=folder / "second", cwd=folder) as command:
        assert command.wait() == 0, command.text
        results = [line for line in command.text.splitlines() if line.startswith("step ")]
    assert attempts(killed, "started")[-1]["step"] > 0
    assert_same_bits(killed, run)
    assert len(results) == 3
    assert set(results) == {f"step 21, 3 epochs, weights {weights_of(run):.6f}"}


def weights_of(run: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints/latest/tensors.safetensors")["model.head.weight"].sum()


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_commands_say_where_the_network_is(command: str, run: Path) -> None:
    found = call(command, run, *(["image.png"] if command == "predict" else []))
    assert_outcome(
        found,
        "model.name = __main__:Net: this run's network exists only in the script or notebook that trained it: in Python, "
        "distributed.load(RUN, model=...) takes it",
    )


def test_report_and_runs_need_no_network(run: Path, tmp_path: Path) -> None:
    found = call("report", run, "--out", tmp_path / "report.html")
    assert found.code == 0, found.out + found.err
    assert "__main__:Net on __main__:data" in (tmp_path / "report.html").read_text()
    assert "finished" in call("runs", run.parent).out


@pytest.mark.parametrize("settings", [(), ("--model.name", "improved_alexnet"), ("--data.name", "generated10")])
def test_the_command_refuses_to_train_it(run: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    found = call("train", run / "config.toml", "--run_dir", tmp_path / "run", *settings)
    which = "data" if "--model.name" in settings else "network"
    assert_outcome(found, f"this run's {which} exists only in the script or notebook that trained it")


def test_commands_import_a_class_from_its_module(tmp_path: Path, restore_threads_and_log: None) -> None:
    module = SCRIPT.partition("draws = ")[0].replace("Conv2d(1,", "Conv2d(3,")
    (tmp_path / "given_net.py").write_text(module)
    run = tmp_path / "run"
    with started_in(tmp_path):
        train(small_config(run, epochs=1, data={"train_samples": 48}), model=import_module("given_net").Net)
        assert 'name = "given_net:Net"' in (run / "config.toml").read_text()
        forget(tmp_path)
        assert json.loads(call("evaluate", run, "--json").out)["model"] == "given_net:Net"


def test_the_example_has_at_most_fifteen_lines() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 15


def test_the_example_runs_as_a_cell(tmp_path: Path) -> None:
    (tmp_path / "cell.txt").write_text(EXAMPLE)
    done = alone(tmp_path, "-c", "cell, space = open('cell.txt').read(), {}\nfor _ in range(2): exec(cell, space)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "test accuracy 100%, 3 epochs\n" * 2
    assert len(attempts(tmp_path / "runs/own", "started")) == 2


def test_the_example_runs_on_two_processes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(EXAMPLE)
    with Command(torchrun(2, "own.py"), output=tmp_path / "output", cwd=tmp_path) as command:
        assert command.wait() == 0, command.text
    assert command.text.count("test accuracy 100%, 3 epochs") == 2
