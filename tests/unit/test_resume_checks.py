"""Which configs may resume the run in a folder, and when that run is finished."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.run_folders import checkpointed, config_of, seal

from distributed.config import TrainConfig
from distributed.errors import ExitCode, InputError
from distributed.run import resume_checks
from distributed.run.checkpoint_layout import name_of
from distributed.run.claim import ClaimedRun


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def run(path) -> Iterator[ClaimedRun]:
    claimed = ClaimedRun.claim(path, world_size=2)
    yield claimed
    claimed.release()


def is_finished(config: TrainConfig) -> bool:
    return resume_checks.is_finished(config, resume_checks.check_run_folder(config))


def test_empty_folder_is_not_finished(path):
    assert is_finished(config_of(path)) is False


def test_unchanged_config_resumes(path):
    checkpointed(path, config_of(path))
    assert is_finished(config_of(path)) is False


def test_changed_experiment_is_refused_listing_every_change(path):
    checkpointed(path, config_of(path))
    with pytest.raises(InputError) as caught:
        is_finished(config_of(path, "--seed", "1", "--optim.lr", "0.2", "--threads", "2"))
    assert caught.value.lines == (
        f"{path}: seed = 1: this run was started with 0",
        f"{path}: optim.lr = 0.2: this run was started with 0.1",
        "a resumed run keeps its experiment: restore these settings, or give another --run_dir",
    )


def test_settings_that_only_one_network_has_are_not_listed(path):
    """To restore them without the name would be another mistake."""
    checkpointed(path, config_of(path, "--optim.name", "sgd"))
    with pytest.raises(InputError) as caught:
        is_finished(config_of(path, "--optim.name", "adamw", "--optim.lr", "0.2"))
    assert caught.value.lines == (
        f"{path}: optim.name = adamw: this run was started with sgd",
        f"{path}: optim.lr = 0.2: this run was started with 0.1",
        f"{path}: optim.weight_decay = 0.05: this run was started with 0.0005",
        "a resumed run keeps its experiment: restore these settings, or give another --run_dir",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.name", "generated10"],
        ["--schedule.name", "plateau"],
        ["--early_stopping.patience", "5"],
        ["--epochs", "20"],
    ],
)
def test_changed_data_schedule_or_length_is_refused(path, arguments):
    checkpointed(path, config_of(path))
    with pytest.raises(InputError, match="this run was started with"):
        is_finished(config_of(path, *arguments))


@pytest.mark.parametrize(
    "arguments",
    [["--logging.every_steps", "1"], ["--checkpoint.every_steps", "5"], ["--threads", "2"], ["--device", "cpu"]],
)
def test_settings_that_leave_the_curve_alone_may_change(path, arguments):
    checkpointed(path, config_of(path))
    assert is_finished(config_of(path, *arguments)) is False


SHARDS = "--exact.shards"


@pytest.mark.parametrize(
    ("before", "now"),
    [([], [SHARDS, "8"]), ([SHARDS, "8"], []), ([SHARDS, "4"], [SHARDS, "4"]), ([SHARDS, "0"], [SHARDS, "0"])],
)
def test_same_number_of_shards_resumes(path, before, now):
    checkpointed(path, config_of(path, *before))
    assert is_finished(config_of(path, *now)) is False


@pytest.mark.parametrize(
    ("before", "now", "shards_before"),
    [([], "4", 8), ([], "0", 8), ([SHARDS, "4"], "8", 4), ([SHARDS, "0"], "8", 0), ([SHARDS, "8"], "0", 8)],
)
def test_changed_number_of_shards_is_refused_once(path, before, now, shards_before):
    checkpointed(path, config_of(path, *before))
    with pytest.raises(InputError) as caught:
        is_finished(config_of(path, SHARDS, now))
    assert caught.value.lines[:-1] == (f"{path}: exact.shards = {now}: this run was started with {shards_before}",)


def test_checkpoint_without_shards_counts_as_fast_mode(path):
    checkpointed(path, config_of(path))
    (state,) = path.glob("checkpoints/*/state.json")
    content = json.loads(state.read_text())
    del content["bits"]["shards"], content["config"]["exact"]
    state.write_text(json.dumps(content))
    seal(state.parent)
    assert is_finished(config_of(path, SHARDS, "0")) is False
    with pytest.raises(InputError, match="this run was started with 0"):
        is_finished(config_of(path, SHARDS, "8"))


def test_moved_run_folder_resumes(path, tmp_path):
    checkpointed(path, config_of(tmp_path / "elsewhere"))
    assert is_finished(config_of(path)) is False


def test_weights_to_start_from_may_be_named_by_an_absolute_path(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    saved = config_of(path).model_copy(update={"init_from": Path("runs/other")})
    checkpointed(path, saved)
    assert is_finished(saved.model_copy(update={"init_from": Path("runs/other").absolute()})) is False
    with pytest.raises(InputError, match=r"init_from = .*: this run was started with runs/other"):
        is_finished(saved.model_copy(update={"init_from": Path("runs/another")}))


def test_run_is_finished_once_its_status_says_so(run, path):
    config = config_of(path)
    run.begin(config, start_step=0, bits={}, images={})
    checkpointed(path, config, epoch=10)
    assert is_finished(config) is False
    run.end("finished", exit_code=ExitCode.FINISHED)
    assert is_finished(config) is True
    assert is_finished(config_of(path, "--logging.every_steps", "1")) is True


def test_more_epochs_resume_a_run_with_constant_schedule(run, path):
    checkpointed(path, config_of(path, "--schedule.name", "constant"), epoch=10)
    run.end("finished", exit_code=ExitCode.FINISHED)
    assert is_finished(config_of(path, "--schedule.name", "constant")) is True
    assert is_finished(config_of(path, "--schedule.name", "constant", "--epochs", "20")) is False


def finished(path: Path, *arguments: str) -> tuple[TrainConfig, Path]:
    """Create a finished run of ten epochs. Return its config and last checkpoint."""
    config = config_of(path, "--schedule.name", "constant", *arguments)
    claimed = ClaimedRun.claim(path, world_size=1)
    checkpointed(path, config, step=90, epoch=9)
    last = checkpointed(path, config, step=100, epoch=10)
    claimed.begin(config, start_step=0, bits={}, images={})
    claimed.saved(step=100, epoch=10)
    claimed.end("finished", exit_code=ExitCode.FINISHED, step=100, epoch=10)
    claimed.release()
    return config, last


@pytest.mark.parametrize("how", ["deleted", "tensors damaged", "state damaged", "no manifest"])
def test_run_without_its_last_checkpoint_is_not_finished(path, how):
    config, last = finished(path)
    assert is_finished(config) is True
    if how == "deleted":
        shutil.rmtree(last)
    else:
        file = {"tensors damaged": "tensors.safetensors", "state damaged": "state.json", "no manifest": "manifest.json"}
        (last / file[how]).write_bytes(b"x")
    assert is_finished(config) is False


@pytest.mark.parametrize("evidence", ["damaged", "set aside", "digests", "status"])
def test_run_that_lost_all_checkpoints_is_refused(path, evidence):
    config, last = finished(path)
    shutil.rmtree(last.with_name(name_of(step=90, epoch=9)))
    if evidence == "damaged":
        (last / "state.json").write_text("{}")
    elif evidence == "set aside":
        last.rename(last.with_name(f"{last.name}.damaged"))
    else:
        shutil.rmtree(last)
    if evidence != "status":
        (path / "status.json").unlink()
    if evidence == "digests":
        (path / "digests.jsonl").write_text(json.dumps({"name": last.name, "tensors": {}}) + "\n")
    with pytest.raises(InputError, match=r"no complete one is left in .*; restore one"):
        is_finished(config)
    assert is_finished(config_of(path, "--checkpoint.upload_to", f"file://{path}")) is False


@pytest.mark.parametrize("status", ['{"status": "failed", "step": 30}', '{"status": "running", "step": 30}', "[", "{}"])
def test_run_that_died_before_its_first_save_starts_over(path, status):
    path.mkdir(parents=True)
    (path / "status.json").write_text(status)
    (path / "digests.jsonl").write_text("")
    assert is_finished(config_of(path)) is False


def test_checkpoints_without_status_are_not_a_finished_run(path):
    config, _ = finished(path)
    (path / "status.json").unlink()
    assert is_finished(config) is False


@pytest.mark.parametrize(("epochs", "found"), [(10, True), (11, False)])
def test_run_is_finished_at_its_number_of_epochs(path, epochs, found):
    finished(path)
    assert is_finished(config_of(path, "--schedule.name", "constant", "--epochs", str(epochs))) is found


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_fewer_epochs_than_trained_are_refused(path, schedule):
    arguments = ["--schedule.name", schedule, "--data.validation_fraction", "0.1"]
    checkpointed(path, config_of(path, *arguments), step=100, epoch=10)
    with pytest.raises(InputError) as caught:
        is_finished(config_of(path, *arguments, "--epochs", "9"))
    assert caught.value.lines == (
        f"epochs = 9: the run in {path} has already trained 10 epochs; give --epochs 10 or more, or another --run_dir",
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_checkpoint_out_of_reach_is_not_lost(path, monkeypatch, number):
    checkpointed(path, config_of(path))
    opens = os.open

    def out_of_reach(file, *arguments, **options):
        if Path(file).name == "state.json":
            raise OSError(number, os.strerror(number), str(file))
        return opens(file, *arguments, **options)

    monkeypatch.setattr(os, "open", out_of_reach)
    with pytest.raises(OSError, match=os.strerror(number)):
        resume_checks.check_run_folder(config_of(path))
