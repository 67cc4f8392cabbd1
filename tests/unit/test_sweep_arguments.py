"""One sweep grammar for Slurm and Ray, on the command line and in a config."""

import re
import shlex
from pathlib import Path

import pytest

from distributed.errors import InputError
from launch.distributions import Distribution
from launch.sweep import Sweep, trial_arguments, trials_of
from launch.sweep_arguments import read_sweep, split_sweep

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs/debug.toml")


def sweep_of(*arguments: str) -> Sweep:
    sweep = read_sweep(split_sweep([DEBUG, *arguments]))
    assert sweep is not None
    return sweep


def config(folder: Path, sweep: str) -> str:
    (folder / "mine.toml").write_text(f'extends = "{DEBUG}"\n[sweep]\n{sweep}')
    return str(folder / "mine.toml")


@pytest.mark.parametrize("sweep", [["--sweep", "model.options.a-b=1,2"], ["--sweep.model.options.a-b", "1,2"]])
def test_dashes_in_a_setting_are_underscores(sweep: list[str]):
    assert sweep_of(*sweep).lists == {"model.options.a_b": ["1", "2"]}


@pytest.mark.parametrize(
    "sweep",
    [
        ["--sweep.optim.lr", "0.1,0.2"],
        ["--sweep.optim.lr=0.1,0.2"],
        ["--sweep", "optim.lr=0.1,0.2"],
        ["--sweep=optim.lr=0.1,0.2"],
    ],
)
@pytest.mark.parametrize("seeds", [["--seeds", "2"], ["--seeds=2"], ["--sweep.seeds", "2"], ["--sweep.seed", "0,1"]])
def test_every_spelling_of_a_sweep_means_the_same(sweep: list[str], seeds: list[str]):
    split = split_sweep([DEBUG, *seeds, *sweep, "--epochs", "3"])
    assert split.common == [DEBUG, "--epochs", "3"]
    found = read_sweep(split)
    assert found is not None
    assert dict(sorted(found.lists.items())) == {"optim.lr": ["0.1", "0.2"], "seed": ["0", "1"]}
    assert read_sweep(split_sweep([DEBUG, *split.sweep_words])) == found, "as in the array that launch.slurm submits"


def test_a_config_and_the_command_line_say_the_same(tmp_path: Path):
    file = config(
        tmp_path,
        'trials = 5\ntrial_seed = 3\nseeds = 2\nmetric = "validation.loss"\noptim.lr = "log_uniform(1e-4, 1e-1)"\n'
        'model.name = ["alexnet", "improved_alexnet"]\noptim.nesterov = [true, false]\n"optim.momentum" = 0.8\n',
    )
    in_file = read_sweep(split_sweep([file]))
    assert in_file is not None
    typed = sweep_of(
        "--trials", "5", "--sweep.trial_seed", "3", "--seeds", "2", "--sweep.metric", "validation.loss",
        "--sweep.optim.lr", "log_uniform(1e-4, 1e-1)", "--sweep.optim.nesterov", "true,false",
        "--sweep.optim.momentum", "0.8", "--sweep.model.name", "alexnet,improved_alexnet",
    )  # fmt: skip
    assert (in_file.lists, in_file.distributions) == (typed.lists, typed.distributions)
    assert (in_file.draws, in_file.trial_seed, in_file.metric) == (5, 3, "validation.loss")
    assert len(trials_of(in_file)) == len(trials_of(typed)) == 5 * 2 * 2 * 2


def test_the_two_examples_of_the_documentation_are_the_same(tmp_path: Path):
    blocks = re.findall(r"^```\w+\n(.*?)^```", (ROOT / "docs/sweeps.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(blocks[0])
    command = shlex.split(blocks[1].replace("\\\n", ""))
    assert command[:4] == ["python", "-m", "launch.slurm", "cifar10"]
    in_file, typed = (read_sweep(split_sweep(arguments)) for arguments in ([str(tmp_path / "mine.toml")], command[3:]))
    assert in_file is not None
    assert typed is not None
    labels = [sorted(sorted(trial.settings) for trial in trials_of(sweep)) for sweep in (in_file, typed)]
    assert labels[0] == labels[1]
    assert len(labels[0]) == 120


def test_the_command_line_replaces_values_of_the_config(tmp_path: Path):
    file = config(tmp_path, 'trials = 5\noptim.lr = "log_uniform(1e-4, 1e-1)"\noptim.momentum = [0.8, 0.9]\n')
    split = split_sweep([file, "--trials", "2", "--sweep.optim.momentum", "0.7"])
    sweep = read_sweep(split)
    assert sweep is not None
    assert (sweep.lists, sweep.draws, list(sweep.distributions)) == ({"optim.momentum": ["0.7"]}, 2, ["optim.lr"])
    arguments = trial_arguments(split.common, sweep, trials_of(sweep)[1])
    assert arguments[-4:-2] == ["--sweep", "none"], "the trial itself is no sweep"
    assert read_sweep(split_sweep([file, "--sweep", "none"])) is None
    assert split_sweep([file, "--sweep", "none"]).common == [file, "--sweep", "none"]


def test_a_single_value_and_a_distribution_are_read(tmp_path: Path):
    assert sweep_of("--sweep.optim.lr", "0.000001").lists == {"optim.lr": ["0.000001"]}
    sweep = sweep_of("--sweep.optim.lr", "uniform(0.1, 0.2)", "--trials=3")
    assert sweep.distributions == {"optim.lr": Distribution("uniform", bounds=(0.1, 0.2))}
    for short in (["--optim.lr", "uniform(0.1, 0.2)"], ["--optim.lr=uniform(0.1, 0.2)"]):
        assert sweep_of(*short, "--trials=3") == sweep
    assert read_sweep(split_sweep([DEBUG, "--epochs", "3"])) is None
    assert sweep_of("--sweep.epochs", "1,2").lists == {"epochs": ["1", "2"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep.optim.lr"], "--sweep.optim.lr: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", "--epochs"], "--sweep.optim.lr: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", "1,1"], "--sweep.optim.lr 1,1: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", "1,1.0"], "--sweep.optim.lr 1,1.0: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", "0.1,1e-1"], "--sweep.optim.lr 0.1,1e-1: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.optim.lr", ","], "--sweep.optim.lr ,: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep", "optim.lr="], "--sweep optim.lr=: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep", "optim.lr"], "--sweep optim.lr: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep"], "--sweep: should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.", "1"], "should be --sweep.SETTING VALUE,VALUE"),
        (["--sweep.run_dir", "/a,/b"], "--sweep.run_dir /a,/b: cannot be swept"),
        (["--sweep.scaling.num_workers", "1,2"], "--sweep.scaling.num_workers 1,2: cannot be swept"),
        (["--sweep.sweep.optim.lr", "1,2"], "cannot be swept"),
        (["--sweep.optim.lr", "1,2", "--sweep", "optim.lr=3"], "--sweep.optim.lr: given twice"),
        (["--seeds", "2", "--sweep.seeds", "2"], "--sweep.seeds: given twice"),
        (["--seeds", "2", "--sweep.seed", "1,2"], "--seeds 2 and sweep.seed: both choose the seeds"),
        (["--seeds"], "--seeds: should be a whole number of at least 1"),
        (["--seeds", "0"], "--seeds 0: should be a whole number of at least 1"),
        (["--seeds", "٣"], "should be a whole number"),
        (
            ["--trials", "0", "--sweep.optim.lr", "uniform(0.1, 0.2)"],
            "--trials 0: should be a whole number of at least 1",
        ),
        (["--trials", "99999", "--sweep.optim.lr", "uniform(0.1, 0.2)"], "--trials 99999: should be at most 10,000"),
        (["--trials", "5"], "--trials 5: has no effect: no setting has a distribution"),
        (["--trials", "5", "--sweep.optim.lr", "1,2"], "--trials 5: has no effect: no setting has a distribution"),
        (["--sweep.trial_seed", "5", "--seeds", "2"], "--sweep.trial_seed 5: has no effect"),
        (["--sweep.optim.lr", "uniform(0.1, 0.2)"], "a distribution needs the number of trials; add --trials 20"),
        (["--sweep.optim.lr", "uniform(2, 1)"], r"--sweep.optim.lr uniform\(2, 1\): should have two finite bounds"),
        (["--sweep.metric", "test.accuracy", "--seeds", "2"], "should be one of validation.accuracy | validation.loss"),
        (["--sweep.metric", "validation.loss"], "no setting is swept"),
    ],
)
def test_a_malformed_sweep_is_refused(arguments: list[str], message: str):
    with pytest.raises(InputError, match=message):
        sweep_of(*arguments)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("optim.lrr = [1]", r"mine.toml:3: sweep.optim.lrr = \[1\]: unknown setting; did you mean optim.lr?"),
        (
            "optim.lr = []",
            r"mine.toml:3: sweep.optim.lr = \[\]: should be a list of different values or a distribution",
        ),
        ("optim.lr = [0.1, 0.1]", "should be a list of different values"),
        ('optim.lr = "uniform(1)"', r"mine.toml:3: sweep.optim.lr = uniform\(1\): should have two numbers"),
        ("trials = 0", "mine.toml:3: sweep.trials = 0: should be a whole number of at least 1"),
        ("trials = 2.5", "sweep.trials = 2.5: should be a whole number"),
        ("seeds = [1, 2]", r"sweep.seeds = \[1, 2\]: should be a whole number"),
        ("optim = 3", "sweep.optim = 3: unknown setting"),
    ],
)
def test_a_malformed_section_is_refused_with_its_line(sweep: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        read_sweep(split_sweep([config(tmp_path, sweep)]))


def test_a_sweep_that_is_no_section_is_refused(tmp_path: Path):
    (tmp_path / "mine.toml").write_text("sweep = 3\n")
    with pytest.raises(InputError, match=r"mine\.toml:1: sweep = 3: is a section"):
        read_sweep(split_sweep([str(tmp_path / "mine.toml")]))


def test_all_mistakes_are_reported_together():
    with pytest.raises(InputError) as found:
        sweep_of("--sweep.optim.lrr", "1", "--seeds", "0", "--sweep.epochs", "uniform(1)")
    assert len(found.value.lines) == 3
