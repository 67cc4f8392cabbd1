import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed import claimed_run
from distributed.checkpoint_files import FORMAT, name_of
from distributed.claimed_run import ClaimedRun
from distributed.config import TrainConfig, load
from distributed.errors import ExitCode, InputError, StorageError
from distributed.files import digest_of, read_json
from distributed.resume_checks import check_resume
from distributed.run_folder import RunFolder
from distributed.schedule import build_early_stopping, build_schedule
from distributed.state import TrainState
from distributed.versions import versions


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


@pytest.fixture
def run(path) -> Iterator[ClaimedRun]:
    claimed = ClaimedRun.claim(path, world_size=2)
    yield claimed
    claimed.release()


def config_of(path: Path, *words: str) -> TrainConfig:
    return load(["--run_dir", str(path), *words])[0]


def checkpointed(path: Path, config: TrainConfig, step: int = 10, epoch: int = 1, **bits: Any) -> Path:
    """A complete checkpoint at the end of an epoch, all but its tensors as a run would have saved it."""
    folder = path / "checkpoints" / name_of(step=step, epoch=epoch)
    folder.mkdir(parents=True)
    state = TrainState(
        build_schedule(config, steps_per_epoch=step // epoch), build_early_stopping(config.early_stopping)
    )
    state.epoch, state.step, state.samples_seen = epoch, step, step * config.global_batch_size
    content = {
        "state": state.state_dict(),
        "config": json.loads(config.model_dump_json()),
        "bits": {"shards": config.shards_on("cpu")} | bits,
    }
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "tensors.safetensors").write_bytes(b"")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the manifest of the files as they are."""
    files = {name: digest_of(folder / name) for name in ("tensors.safetensors", "state.json")}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_claim_makes_the_folder(run, path):
    assert (path / "logs").is_dir()
    assert (path / "checkpoints").is_dir()
    assert read_json(path / "attempt.json")["token"] == run.token
    run.check_ours()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(run, path, monkeypatch):
    monkeypatch.setattr(claimed_run, "LOCK_WAIT_SECONDS", 0.05)
    with pytest.raises(InputError, match="another run is writing there") as caught:
        ClaimedRun.claim(path, world_size=1)
    assert f"process {read_json(path / 'attempt.json')['pid']} on" in str(caught.value)
    assert "--run_dir" in str(caught.value)
    run.check_ours()


def test_a_released_folder_can_be_claimed_again(path):
    first = ClaimedRun.claim(path, world_size=1)
    first.release()
    second = ClaimedRun.claim(path, world_size=1)
    second.check_ours()
    with pytest.raises(StorageError, match="taken over"):
        first.check_ours()
    second.release()


def test_an_attempt_that_was_taken_over_can_write_no_ending(run, path):
    run.begin(config_of(path), start_step=0, details={})
    (path / "attempt.json").write_text('{"token": "another", "pid": 7, "host": "there"}')
    with pytest.raises(StorageError, match="taken over by process 7 on there"):
        run.end("finished", exit_code=ExitCode.FINISHED)
    assert run.status()["status"] == "running"
    assert [line["event"] for line in lines_of(path / "attempts.jsonl")] == ["started"]


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run_dir = .*give another with --run_dir"):
        ClaimedRun.claim(tmp_path / below, world_size=1)


def test_status_and_attempts_tell_how_an_attempt_went(run, path):
    config = config_of(path, "--epochs", "3")
    run.begin(config, start_step=5, details={"bits": {"threads": 1}})
    assert (run.status()["status"], run.status()["step"], run.status()["world_size"]) == ("running", 5, 2)
    run.end("stopped", exit_code=ExitCode.STOPPED, reason="SIGTERM", step=9, epoch=1)
    assert {
        "status": "stopped",
        "reason": "SIGTERM",
        "exit_code": 75,
        "step": 9,
        "epoch": 1,
    }.items() <= run.status().items()
    started, stopped = lines_of(path / "attempts.jsonl")
    assert started["event"] == "started"
    assert started["bits"] == {"threads": 1}
    assert started["versions"] == versions()
    assert (stopped["event"], stopped["exit_code"], stopped["token"]) == ("stopped", 75, run.token)


def test_the_config_of_a_run_can_be_passed_back_in(run, path):
    config = config_of(path, "--schedule.name", "plateau", "--early_stopping.patience", "3")
    run.begin(config, start_step=0, details={})
    assert load([str(path / "config.toml")])[0] == config


def test_a_folder_without_a_run_has_no_status_and_no_config(path):
    assert RunFolder(path).status() == {}
    assert RunFolder(path).saved_config() is None
    assert check_resume(config_of(path)) is False


def test_versions_name_what_numbers_depend_on():
    assert {"python", "torch", "numpy"} <= versions().keys()
    assert "not installed" not in versions().values()


# Resuming


def test_the_same_config_may_go_on(path):
    checkpointed(path, config_of(path))
    assert check_resume(config_of(path)) is False


def test_the_newest_checkpoint_says_which_config_it_was(path):
    checkpointed(path, config_of(path, "--seed", "1"), step=9)
    checkpointed(path, config_of(path, "--seed", "2"), step=10)
    saved = RunFolder(path).saved_config()
    assert saved is not None
    assert saved.seed == 2


def test_a_changed_experiment_is_refused_with_every_difference(path):
    checkpointed(path, config_of(path))
    with pytest.raises(InputError) as caught:
        check_resume(config_of(path, "--seed", "1", "--optim.lr", "0.2", "--threads", "2"))
    assert caught.value.lines == (
        f"{path}: seed = 1: this run was begun with 0",
        f"{path}: optim.lr = 0.2: this run was begun with 0.1",
        "a resumed run keeps its experiment: take these settings back, or give another --run_dir",
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--data.name", "generated10"],
        ["--schedule.name", "plateau"],
        ["--early_stopping.patience", "5"],
        ["--epochs", "20"],
    ],
)
def test_other_data_schedules_and_lengths_are_other_experiments(path, words):
    checkpointed(path, config_of(path))
    with pytest.raises(InputError, match="this run was begun with"):
        check_resume(config_of(path, *words))


@pytest.mark.parametrize(
    "words",
    [["--logging.every_steps", "1"], ["--checkpoint.every_steps", "5"], ["--threads", "2"], ["--device", "cpu"]],
)
def test_what_the_curve_does_not_depend_on_may_change(path, words):
    checkpointed(path, config_of(path))
    assert check_resume(config_of(path, *words)) is False


SHARDS = "--exact.shards"


@pytest.mark.parametrize(
    ("begun", "now"),
    [([], [SHARDS, "8"]), ([SHARDS, "8"], []), ([SHARDS, "4"], [SHARDS, "4"]), ([SHARDS, "0"], [SHARDS, "0"])],
)
def test_a_run_goes_on_with_as_many_shards_as_it_was_begun_with(path, begun, now):
    checkpointed(path, config_of(path, *begun))
    assert check_resume(config_of(path, *now)) is False


@pytest.mark.parametrize(
    ("begun", "now", "before"),
    [([], "4", 8), ([], "0", 8), ([SHARDS, "4"], "8", 4), ([SHARDS, "0"], "8", 0), ([SHARDS, "8"], "0", 8)],
)
def test_another_number_of_shards_is_refused_once_with_the_number_the_run_was_begun_with(path, begun, now, before):
    checkpointed(path, config_of(path, *begun))
    with pytest.raises(InputError) as caught:
        check_resume(config_of(path, SHARDS, now))
    assert caught.value.lines[:-1] == (f"{path}: exact.shards = {now}: this run was begun with {before}",)


def test_a_run_from_before_there_were_shards_was_in_fast_mode(path):
    checkpointed(path, config_of(path))
    (state,) = path.glob("checkpoints/*/state.json")
    content = json.loads(state.read_text())
    del content["bits"]["shards"], content["config"]["exact"]
    state.write_text(json.dumps(content))
    seal(state.parent)
    assert check_resume(config_of(path, SHARDS, "0")) is False
    with pytest.raises(InputError, match="this run was begun with 0"):
        check_resume(config_of(path, SHARDS, "8"))


def test_a_moved_run_folder_goes_on(path, tmp_path):
    checkpointed(path, config_of(tmp_path / "elsewhere"))
    assert check_resume(config_of(path)) is False


def test_a_finished_run_is_finished(run, path):
    config = config_of(path)
    run.begin(config, start_step=0, details={})
    checkpointed(path, config, epoch=10)
    assert check_resume(config) is False
    run.end("finished", exit_code=ExitCode.FINISHED)
    assert check_resume(config) is True
    assert check_resume(config_of(path, "--logging.every_steps", "1")) is True


def test_a_finished_run_goes_on_under_more_epochs_where_the_schedule_allows_it(run, path):
    checkpointed(path, config_of(path, "--schedule.name", "constant"), epoch=10)
    run.end("finished", exit_code=ExitCode.FINISHED)
    assert check_resume(config_of(path, "--schedule.name", "constant")) is True
    assert check_resume(config_of(path, "--schedule.name", "constant", "--epochs", "20")) is False
