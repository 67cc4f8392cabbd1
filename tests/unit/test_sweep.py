"""The list of trials, which is the same under every launcher and after every kill."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from distributed.config import from_command_line
from distributed.errors import InputError
from launch.on_ray.settings import sweep_trainings
from launch.slurm.task import indices, task_of
from launch.sweep import Sweep, check_compared, check_trials, in_subfolder, trial_arguments, trials_of
from launch.sweep_arguments import read_sweep, split_sweep

DEBUG = str(Path(__file__).parents[2] / "configs/debug.toml")
RANDOM = ("--sweep.optim.lr", "log_uniform(1e-4, 1e-1)", "--sweep.optim.momentum", "uniform(0.5, 0.99)")


def sweep_of(*arguments: str) -> Sweep:
    sweep = read_sweep(split_sweep([DEBUG, *arguments]))
    assert sweep is not None
    return sweep


def test_lists_are_trained_in_every_combination():
    trials = trials_of(sweep_of("--seeds", "2", "--sweep.optim.lr", "0.1,0.2"))
    assert [trial.label for trial in trials] == [
        "optim.lr=0.1,seed=0", "optim.lr=0.1,seed=1", "optim.lr=0.2,seed=0", "optim.lr=0.2,seed=1",
    ]  # fmt: skip
    assert [trial.folder for trial in trials][3] == "optim.lr=0.2/seed-1"
    assert [trial.index for trial in trials] == [0, 1, 2, 3]


def test_each_draw_is_trained_in_every_combination():
    trials = trials_of(sweep_of(*RANDOM, "--trials", "3", "--sweep.optim.nesterov", "true,false", "--seeds", "2"))
    assert len(trials) == 12
    assert len({trial.settings[:2] for trial in trials}) == 3
    assert len({trial.folder for trial in trials}) == 12


@pytest.mark.parametrize("count", [1, 7, 40])
def test_more_trials_extend_the_list(count: int):
    longer = trials_of(sweep_of(*RANDOM, "--trials", "60"))
    assert trials_of(sweep_of(*RANDOM, "--trials", str(count))) == longer[:count]
    assert trials_of(sweep_of(*RANDOM, "--trials", "60", "--sweep.trial_seed", "1"))[0] != longer[0]


def test_a_draw_does_not_depend_on_other_settings():
    alone = trials_of(sweep_of(*RANDOM[:2], "--trials", "10"))
    both = trials_of(sweep_of(*RANDOM, "--trials", "10"))
    assert [trial.settings[0] for trial in both] == [trial.settings[0] for trial in alone]


def test_no_draw_is_trained_twice():
    trials = trials_of(sweep_of("--sweep.global_batch_size", "integers(30, 59)", "--trials", "30"))
    assert sorted(trial.settings[0][1] for trial in trials) == [str(size) for size in range(30, 60)]
    with pytest.raises(InputError, match="trials = 31, but only 30 different draws were found; lower trials"):
        trials_of(sweep_of("--sweep.global_batch_size", "integers(30, 59)", "--trials", "31"))


def test_too_many_trials_are_refused():
    with pytest.raises(InputError, match="sweep: 20,000 trials; should be at most 10,000"):
        trials_of(sweep_of(*RANDOM, "--trials", "10000", "--seeds", "2"))


@pytest.mark.parametrize(
    "sweep",
    [
        ["--sweep.optim.lr", "0.1,0.05", "--seeds", "3"],
        ["--seeds", "4"],
        [*RANDOM, "--trials", "6", "--sweep.trial_seed", "5"],
        ["--sweep.data.augment.crop", "choice(0, 2, 4)", "--sweep.optim.lr", "0.1,0.05", "--trials", "2"],
    ],
)
def test_slurm_and_ray_train_the_same(sweep: list[str], tmp_path: Path):
    arguments = [DEBUG, "--device", "cpu", "--run_dir", str(tmp_path / "run"), *sweep]
    split = split_sweep(arguments)
    found = read_sweep(split)
    assert found is not None
    on_ray = sweep_trainings(split.common, found)
    submitted = [*split.common, *split.sweep_words]
    on_slurm = [task_of(submitted, index) for index in range(len(on_ray))]
    configs = [from_command_line(task.arguments).config for task in on_slurm]
    threads = {"threads": on_ray[0].config.threads}  # chosen by the launcher
    assert [config.model_copy(update=threads) for config in configs] == [training.config for training in on_ray]
    assert {task.folder for task in on_slurm} == {training.sweep_folder for training in on_ray} == {tmp_path / "run"}
    with pytest.raises(InputError, match=f"it has no trial {len(on_ray)}; submit it with --array=0-{len(on_ray) - 1}"):
        task_of(submitted, len(on_ray))


def test_names_of_folders_stay_short_and_different():
    long = "x" * 300
    trials = trials_of(sweep_of("--sweep.data.root", f"/a/b,/a_b,{long}1,{long}2"))
    folders = [trial.folder for trial in trials]
    assert len(set(folders)) == 4
    assert all(len(folder) <= 200 and "/" not in folder for folder in folders)
    assert folders[0].startswith("data.root=_a_b~")


def test_the_run_folder_and_the_uploads_get_a_subfolder():
    assert in_subfolder([DEBUG, "--run-dir=a"], "b") == [DEBUG, "--run_dir", "a/b"]
    upload = ["--checkpoint.upload-to", "file:///store/", "--epochs", "3"]
    assert in_subfolder([DEBUG, *upload], "b") == [
        DEBUG, "--epochs", "3", "--run_dir", "runs/debug/b", "--checkpoint.upload_to", "file:///store/b",
    ]  # fmt: skip


def test_invalid_trials_are_named():
    sweep = sweep_of("--sweep.optim.lr", "0.1,200,300", "--seeds", "2")

    def check(*more: str) -> tuple[str, ...]:
        with pytest.raises(InputError) as found:
            check_trials(trials_of(sweep), lambda trial: trial_arguments([DEBUG, *more], sweep, trial))
        return found.value.lines

    assert check() == (
        "trial 2 (optim.lr=200,seed=0) and 1 more: command line: optim.lr = 200: should be less than or equal to 100",
        "trial 4 (optim.lr=300,seed=0) and 1 more: command line: optim.lr = 300: should be less than or equal to 100",
    )
    assert check("--epochs", "0")[0] == "command line: epochs = 0: should be greater than 0", "of every trial"


def test_an_array_task_gets_its_seed_or_its_trial():
    assert task_of([DEBUG, "--epochs", "3"], None).arguments == [DEBUG, "--epochs", "3"]
    seed = task_of([DEBUG], 4)
    assert seed.arguments == [DEBUG, "--seed", "4", "--run_dir", "runs/debug/seed-4"]
    assert (seed.folder, seed.metric) == (Path("runs/debug").absolute(), "")
    with pytest.raises(InputError, match="the task's number is the seed"):
        task_of([DEBUG, "--seed", "1"], 4)
    trial = task_of([DEBUG, "--sweep.optim.lr", "0.1,0.2"], 1)
    assert trial.arguments == [DEBUG, "--optim.lr", "0.2", "--run_dir", "runs/debug/optim.lr=0.2"]
    assert (trial.folder, trial.metric) == (Path("runs/debug").absolute(), "validation.accuracy")
    with pytest.raises(InputError, match="sweep: this job is not an array; submit it with --array=0-1"):
        task_of([DEBUG, "--sweep.optim.lr", "0.1,0.2"], None)


def test_the_upload_url_of_a_trial_is_valid_and_its_own():
    name = "model.widths=[32, 64]"
    urls = {
        from_command_line(
            in_subfolder([DEBUG, "--checkpoint.upload_to", "s3://b/p"], folder)
        ).config.checkpoint.upload_to
        for folder in (name, name.replace("[", "{"), "optim.lr=0.1/seed-0")
    }
    assert len(urls) == 3
    assert "s3://b/p/optim.lr=0.1/seed-0" in urls
    assert any(url.startswith("s3://b/p/model.widths=_32,_64_~") for url in urls)


def test_tasks_are_written_as_slurm_reads_them():
    assert [indices(tasks) for tasks in ([0], [0, 1, 2], [0, 2, 3, 7])] == ["0", "0-2", "0,2-3,7"]


@pytest.mark.parametrize(("lists", "refused"), [({"optim.lr": ["0.1"], "seed": ["0"]}, True), ({"seed": ["0"]}, False)])
def test_trials_of_different_settings_need_validation_images(lists: dict[str, list[str]], refused: bool) -> None:
    config = from_command_line(["--data.validation_fraction", "0"]).config
    with pytest.raises(InputError, match="never by test images") if refused else nullcontext():
        check_compared(config, Sweep(lists, {}))
