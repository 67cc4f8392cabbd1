import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.devices import check_command, check_setting, no_gpus

TRAIN = [sys.executable, "-m", "distributed.train"]


@pytest.mark.parametrize(
    "words",
    [
        [*TRAIN, "--epochs", "1"],
        [*TRAIN, "configs/debug.toml"],
        [*TRAIN, "--device", "auto"],
        [*TRAIN, "--device=auto"],
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *TRAIN[1:], "configs/debug.toml"],
        ["ray", "job", "submit", "--", "python", "-m", "launch.ray_train", "configs/debug.toml"],
        [sys.executable, "-m", "kit.killed_in_save", "before the rename", "4", "configs/debug.toml"],
        ["sbatch", "--nodes=2", Path("slurm/train.sh"), Path("configs/debug.toml")],
        [Path("bin/distributed-train"), "debug"],
    ],
    ids=lambda words: " ".join(map(str, words[-3:])),
)
def test_training_without_a_device_is_refused(words):
    with pytest.raises(AssertionError, match="add --device cpu"):
        check_command(words)
    named = [word for word in words if word not in ("--device", "--device=auto", "auto")]
    check_command([*named, "--device", "cpu"])
    check_command([*named, "--device=cuda"])


def test_a_config_file_may_name_the_device(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('epochs = 1\ndevice = "cpu"\n')
    check_command([*TRAIN, str(file)])
    file.write_text('epochs = 1\ndevice = "auto"\n')
    with pytest.raises(AssertionError, match="add --device cpu"):
        check_command([*TRAIN, str(file)])


def test_other_commands_need_no_device():
    check_command([*TRAIN, "--help"])
    check_command([sys.executable, "-m", "distributed.evaluate", "runs/debug"])
    check_command(["shellcheck", "-x", Path("slurm/train.sh")])


def test_training_without_a_device_is_not_started(tmp_path):
    for start in (subprocess.run, subprocess.Popen, subprocess.check_output):
        with pytest.raises(AssertionError, match="add --device cpu"):
            start([*TRAIN, "--run_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("restore_threads_and_log")
def test_training_in_process_without_a_device_is_refused(tmp_path):
    from distributed.config import from_command_line
    from distributed.recipe import train

    with pytest.raises(AssertionError, match="add --device cpu"):
        train(from_command_line(["--data.name", "generated10", "--run_dir", str(tmp_path / "run")]).config)
    assert not (tmp_path / "run").exists()
    check_setting("cpu")


def test_gpus_are_hidden_from_tests_and_their_children():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "''\n"


@pytest.mark.parametrize("before", [None, "0,1"])
def test_visible_gpus_are_restored(before, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with no_gpus():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
