"""Options of `launch.slurm` that are passed on to sbatch."""

import sys
from pathlib import Path

import pytest
from kit.commands import ROOT

from distributed.errors import InputError
from launch.environment import Allocation
from launch.slurm.__main__ import check, check_sbatch_options, parser, sbatch_command, submit, venv_export


@pytest.mark.parametrize(
    "option",
    [
        "--gres=gpu:4",
        "--gres=scratch:9,gpu:a100:4",
        "--gpus=8",
        "-G8",
        "--gpus-per-task=1",
        "--gpus-per-socket=4",
        "--tres-per-task=gres/gpu:4",
    ],
)
def test_gpus_that_would_not_be_checked_are_refused(option: str) -> None:
    with pytest.raises(InputError, match="it would not be checked; give --gpus-per-node N"):
        check_sbatch_options([option])


@pytest.mark.parametrize("option", ["--chdir=/elsewhere", "-D", "-D/elsewhere"])
def test_another_folder_is_refused(option: str) -> None:
    with pytest.raises(InputError, match="it would not be checked; give absolute paths, or run this command in that"):
        check_sbatch_options([option])


def test_the_job_uses_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout may have a .venv of its own, in which the user's modules are missing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").touch()
    for name in ("VENV", "CONDA_ENV", "CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    command = sbatch_command(parser().parse_args([]), ["config.toml"])
    assert any(f"VENV={tmp_path}" in word for word in command)
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert not any("VENV=" in word for word in sbatch_command(parser().parse_args([]), ["config.toml"]))


def test_a_conda_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no bin/activate, and the script would activate the checkout's .venv."""
    (tmp_path / "conda-meta").mkdir()
    for name in ("VENV", "CONDA_ENV", "CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert venv_export(tmp_path) == []
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    assert venv_export(tmp_path) == [f"CONDA_ENV={tmp_path}"]
    named = sbatch_command(parser().parse_args(["--sbatch=--export=ALL,VENV=/my/venv"]), ["config.toml"])
    assert "--export=ALL,VENV=/my/venv" in named


def test_a_job_inherits_nothing_from_a_surrounding_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CONF", "SETUP"):
        monkeypatch.setenv(name, "1")
    (tmp_path / "sbatch").write_text("#!/bin/sh\nenv > env.txt\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    assert submit(["sbatch"]) == 0
    names = {line.partition("=")[0] for line in (tmp_path / "env.txt").read_text().splitlines()}
    assert {name for name in names if name.startswith("SLURM_")} == {"SLURM_CONF"}
    assert "SETUP" in names


def test_other_resources_are_passed_on() -> None:
    check_sbatch_options(["--gres=scratch:100", "--tres-per-task=cpu:4", "--export=ALL,SETUP=file"])


def test_the_number_of_processes_is_the_one_that_the_job_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job reads RANKS_PER_NODE, with 8 shards in exact mode."""
    with pytest.raises(InputError, match=r"RANKS_PER_NODE=16: it would not be checked; give --ranks-per-node N"):
        check_sbatch_options(["--export=ALL,RANKS_PER_NODE=16"])
    monkeypatch.setenv("RANKS_PER_NODE", "16")
    options = parser().parse_args([])
    assert options.ranks_per_node == 16
    with pytest.raises(InputError, match="exact"):
        check(options, ["debug", "--device", "cpu", "--run_dir", str(tmp_path / "run")])
    assert not check(parser().parse_args(["--ranks-per-node", "8"]), ["debug", "--run_dir", str(tmp_path / "run")])


def test_gpus_that_a_cpu_run_would_reserve_are_refused(tmp_path: Path) -> None:
    options = parser().parse_args(["--gpus-per-node", "a100:4"])
    with pytest.raises(InputError, match="device = cpu: --gpus-per-node a100:4 would reserve unused GPUs"):
        check(options, ["debug", "--device", "cpu", "--run_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(("ranks", "is_refused"), [("", True), ("1", False)])
def test_several_mig_slices_are_refused(ranks: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SLURM_JOB_ID": "1006632961", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b",
        "RANKS_PER_NODE": ranks,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(InputError, match="SLURM_GPUS_ON_NODE = 2, of MIG slices"):
            Allocation.from_environment()
    else:
        assert Allocation.from_environment().ranks == 1


@pytest.mark.parametrize("gpus", ["4", "a100:4"])
def test_gpus_may_have_a_type(gpus: str) -> None:
    command = sbatch_command(parser().parse_args(["--gpus-per-node", gpus]), ["config.toml"])
    assert f"--gpus-per-node={gpus}" in command
    assert not any("MAX_REQUEUES" in word for word in command), "the variable of that name counts"


@pytest.mark.parametrize("gpus", ["a100", "a100:", "0", "-1"])
def test_gpus_need_a_number(gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--gpus-per-node={gpus}"])
    assert "should be a whole number of at least 1" in capsys.readouterr().err
