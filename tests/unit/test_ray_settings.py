"""From a command line to trainings on Ray workers."""

import subprocess
import sys
from pathlib import Path

import pytest

from distributed.errors import InputError
from launch import ray_train
from launch.on_ray.settings import check_address, check_training, sweep_trainings
from launch.sweep_arguments import read_sweep, split_sweep

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs/debug.toml")


def test_a_worker_gets_a_thread_per_core_and_no_scaling(tmp_path):
    run = ["--run_dir", str(tmp_path / "run")]
    training = check_training([DEBUG, *run, "--scaling.num_workers", "3", "--scaling.cpus_per_worker", "2"])
    assert (training.scaling.num_workers, training.scaling.least_workers) == (3, 3)
    assert (training.config.scaling, training.config.threads) == (None, 2)
    own = check_training([DEBUG, *run, "--threads", "5"])
    assert (own.scaling.num_workers, own.config.threads) == (2, 5)


def test_storage_path_holds_a_relative_run_folder(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'extends = "{DEBUG}"\n[scaling]\nmin_workers = 1\nstorage_path = "{tmp_path}"\n')
    training = check_training([str(file)])
    assert training.config.run_dir == tmp_path / "runs/mine"
    assert (training.scaling.least_workers, training.scaling.num_workers) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run_dir = runs/debug: relative, but a worker runs in a folder of its own"),
        (["--run_dir", "here"], "run_dir = here: relative"),
        (["--data.name", "cifar10", "--data.root", "data"], "data.root = data: relative"),
        (["--init_from", "runs/other", "--run_dir", "/tmp/x"], "init_from = runs/other: relative"),
        (["--scaling.storage_path", "shared"], "scaling.storage_path = shared/runs/debug: relative"),
        (["--scaling.storage_path", "/shared", "--run_dir", "/tmp/x"], "run_dir = /tmp/x is absolute already"),
        (["--run_dir", "/tmp/x", "--exact.shards", "2", "--scaling.num_workers", "3"], "is less than the 3 processes"),
        (["--run_dir", "/tmp/x", "--device", "cuda", "--scaling.num_workers", "1"], "Ray reserves no GPU"),
        (["--run_dir", "/tmp/x", "--device", "cpu", "--scaling.gpus_per_worker", "1"], "reserves GPUs that"),
        (["--run_dir", "/tmp/x", "--scaling.min_workers", "1", "--scaling.placement", "strict_pack"], "set pack, or remove"),
        (["--run_dir", "/tmp/x", "--scaling.num_worker", "1"], "did you mean scaling.num_workers?"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?").replace("(", r"\(")):
        check_training([DEBUG, *arguments])


def swept(*arguments: str):
    split = split_sweep([DEBUG, *arguments])
    sweep = read_sweep(split)
    assert sweep is not None
    return sweep_trainings(split.common, sweep)


def test_a_sweep_has_a_folder_per_combination(tmp_path):
    trainings = swept(
        "--sweep.optim.lr", "0.1,0.01", "--epochs", "3", "--sweep.seed=1,2", "--run_dir", str(tmp_path / "run")
    )
    assert [training.name for training in trainings] == [
        "optim.lr=0.1/seed-1", "optim.lr=0.1/seed-2", "optim.lr=0.01/seed-1", "optim.lr=0.01/seed-2",
    ]  # fmt: skip
    assert {training.sweep_folder for training in trainings} == {tmp_path / "run"}
    assert [(one.config.optim.lr, one.config.seed, one.config.epochs) for one in trainings][2] == (0.01, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep.scaling.num_workers", "1,2"], "cannot be swept"),
        (["--sweep.optim.lrr", "1,2"], "sweep.optim.lrr 1,2: unknown setting; did you mean optim.lr"),
        (
            ["--sweep.optim.lr", "0.1,200"],
            "trial 1 .optim.lr=200.: .*optim.lr = 200: should be less than or equal to 100",
        ),
        (["--sweep.optim.lr", "0.1", "--optim.lr", "0.2"], "--optim.lr: given twice"),
        (["--sweep.optim.lr", "0.1", "--data.validation_fraction", "0"], "never by test images"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        swept("--run_dir", str(tmp_path / "run"), *arguments)


def test_bad_input_is_reported_before_ray_or_torch_is_imported():
    command = [sys.executable, "-X", "importtime", "-m", "launch.ray_train", DEBUG, "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, len(lines)) == (2, 1), lines
    assert lines[0].startswith("error: run_dir = runs/debug: relative")
    imported = {line.split("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not {"torch", "ray"} & imported


def test_a_folder_that_may_not_be_entered_is_one_line(closed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ray_train", str(closed / "config.toml")])
    assert ray_train.main() == 2
    assert f"{closed}/config.toml: Permission denied; " in capsys.readouterr().err


def test_a_node_check_does_not_import_torch_first():
    code = "import sys, launch.on_ray.node_check; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://host:10001", "nowhere", "127.0.0.1:70000"])
def test_an_address_without_a_cluster_fails_at_once(address):
    with pytest.raises(InputError, match=f"environment: RAY_ADDRESS = {address}: "):
        check_address(address)
