"""One sweep grammar for Slurm and Ray, and the tasks of a Slurm array."""

from pathlib import Path

import pytest

from distributed.errors import InputError
from launch.slurm.__main__ import swept_trainings
from launch.sweep_arguments import combinations, in_subfolder, split_sweep, task_arguments

DEBUG = str(Path(__file__).parents[2] / "configs/debug.toml")


@pytest.mark.parametrize(
    "sweep",
    [
        ["--sweep.optim.lr", "0.1,0.2"],
        ["--sweep.optim.lr=0.1,0.2"],
        ["--sweep", "optim.lr=0.1,0.2"],
        ["--sweep=optim.lr=0.1,0.2"],
    ],
)
def test_every_spelling_of_a_sweep_means_the_same(sweep: list[str]):
    expected = {"optim.lr": ["0.1", "0.2"], "seed": ["0", "1"]}
    assert split_sweep(["--seeds", "2", *sweep, "--epochs", "3"]) == (["--epochs", "3"], expected)


def test_a_sweep_is_every_combination():
    both = combinations({"optim.lr": ["0.1", "0.2"], "seed": ["0", "1"]})
    assert [one.label for one in both] == [
        "optim.lr=0.1,seed=0", "optim.lr=0.1,seed=1", "optim.lr=0.2,seed=0", "optim.lr=0.2,seed=1",
    ]  # fmt: skip
    trainings = swept_trainings([DEBUG], {"optim.lr": ["0.1", "0.2"], "seed": ["0", "1"]})
    assert len(trainings) == 4
    assert trainings[3][1:] == ["--optim.lr", "0.2", "--seed", "1", "--run_dir", "runs/debug/optim.lr=0.2/seed-1"]
    assert swept_trainings([DEBUG], {}) == [[DEBUG]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep.optim.lr"], "--sweep.optim.lr: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", "--epochs"], "--sweep.optim.lr: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", "1,1"], "--sweep.optim.lr 1,1: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep", "optim.lr="], "--sweep optim.lr=: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep", "optim.lr"], "--sweep optim.lr: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep"], "--sweep: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.", "1"], "should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.run_dir", "/a,/b"], "--sweep.run_dir: cannot be swept"),
        (["--sweep.scaling.num_workers", "1,2"], "--sweep.scaling.num_workers: cannot be swept"),
        (["--sweep.optim.lr", "1,2", "--sweep", "optim.lr=3"], "--sweep.optim.lr: given twice"),
        (["--seeds", "2", "--sweep.seed", "1,2"], "--seeds and --sweep.seed: both choose the seeds"),
        (["--seeds"], "--seeds: should be a whole number of at least 1"),
        (["--seeds", "0"], "--seeds 0: should be a whole number of at least 1"),
        (["--seeds", "٣"], "should be a whole number"),
    ],
)
def test_a_malformed_sweep_is_refused(arguments: list[str], message: str):
    with pytest.raises(InputError, match=message):
        split_sweep(arguments, not_swept=("scaling.",))


def test_the_run_folder_and_the_uploads_get_a_subfolder():
    assert in_subfolder([DEBUG, "--run-dir=a"], "b") == [DEBUG, "--run_dir", "a/b"]
    upload = ["--checkpoint.upload-to", "file:///store/", "--epochs", "3"]
    assert in_subfolder([DEBUG, *upload], "b") == [
        DEBUG, "--epochs", "3", "--run_dir", "runs/debug/b", "--checkpoint.upload_to", "file:///store/b",
    ]  # fmt: skip


def test_an_array_task_gets_its_seed_or_its_line(tmp_path: Path):
    assert task_arguments([DEBUG, "--epochs", "3"], None) == [DEBUG, "--epochs", "3"]
    assert task_arguments([DEBUG], 4) == [DEBUG, "--seed", "4", "--run_dir", "runs/debug/seed-4"]
    with pytest.raises(InputError, match="the task's number is the seed"):
        task_arguments([DEBUG, "--seed", "1"], 4)
    (tmp_path / "sweep").write_text(f"{DEBUG} --run_dir 'a b'\n")
    assert task_arguments([f"@{tmp_path}/sweep"], 0) == [DEBUG, "--run_dir", "a b"]
    with pytest.raises(InputError, match="it has no line for task 1"):
        task_arguments([f"@{tmp_path}/sweep"], 1)
    with pytest.raises(InputError, match="this job is not an array"):
        task_arguments([f"@{tmp_path}/sweep"], None)
