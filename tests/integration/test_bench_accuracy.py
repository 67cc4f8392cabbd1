"""`bench accuracy` as a user types it, on a few generated images."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from distributed.bench.workload import Workload

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-bench" / "bin" / "python"
CONFIG = """
epochs = 2
global_batch_size = 16
threads = 1

[data]
name = "generated10"
train_samples = 40
test_samples = 20
validation_fraction = 0.0
augment = { flip = "alternating", crop_padding = "reflect" }

[model]
name = "fast_alexnet"

[loss]
label_smoothing = 0.2

[optim]
name = "sgd"
ema_decay = 0.9
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(CONFIG)
    return file


def bench(*arguments):
    command = [
        sys.executable,
        "-m",
        "distributed.bench",
        "accuracy",
        "--device",
        "cpu",
        "--no-peers",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)


def test_a_repeated_command_trains_only_what_is_missing(config, tmp_path):
    file = tmp_path / "accuracy.json"
    first = bench("--config", config, "--json", file, "--seeds", 3)
    assert first.returncode == 0, first.stderr
    (run,) = json.loads(file.read_text())["runs"]
    assert (run["side"], run["seed"], len(run["curve"])) == ("ours", 3, 2)
    (before, _), (after, accuracy) = run["curve"]
    assert 0 < before < after == run["seconds"]
    assert accuracy == run["accuracy"]

    second = bench("--config", config, "--json", file, "--seeds", 3, 4)
    assert second.returncode == 0, second.stderr
    assert "seed 3" not in second.stderr
    assert json.loads(file.read_text())["runs"][0] == run
    assert [one["seed"] for one in json.loads(file.read_text())["runs"]] == [3, 4]

    other = bench("--config", config, "--json", file, "--epochs", 1)
    assert other.returncode == 2
    assert other.stderr.strip() == (
        f"error: --json {file}: has runs with settings.epochs = 2, not 1; name another file, or delete it"
    )


@pytest.mark.skipif(not (find_spec("timm") or PEERS.exists()), reason="timm is not installed")
def test_timm_trains_to_the_end(config):
    settings = {"arguments": [str(config), "--device", "cpu"], "threads": 1, "workers": 1}
    python = Path(sys.executable) if find_spec("timm") else PEERS
    workload = Workload("distributed.bench.workloads.timm_training:run", settings, 1, python=python)
    ((before, _), (after, accuracy)) = workload.measure(200).figures[0]["curve"]
    assert 0 < before < after
    assert 0 <= accuracy <= 1
