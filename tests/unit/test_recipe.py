import json
import shutil
from pathlib import Path

import pytest
import torch
from kit.small_runs import Recorder, StopAfter

from distributed.config import TrainConfig, from_command_line
from distributed.errors import InputError, StorageError
from distributed.metrics.records import TrainMetrics
from distributed.recipe import train
from distributed.run import claim
from distributed.run.checkpoint_layout import checkpoints
from distributed.run.folder import RunFolder
from distributed.training import determinism
from distributed.training.state import TrainState

STEPS_PER_EPOCH = 2


pytestmark = pytest.mark.usefixtures("restore_threads_and_log")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    arguments = (
        "--data.name generated10 --data.train_samples 40 --data.test_samples 10 --global_batch_size 16 --epochs 4 "
        "--precision float32 --threads 1 --device cpu --logging.tensorboard false --logging.curves false "
        "--logging.every_steps 1 --schedule.name constant --model.dropout 0.5"
    )
    return from_command_line([*arguments.split(), "--run_dir", str(tmp_path / "run")]).config


def newest(config: TrainConfig) -> dict:
    return json.loads((checkpoints(RunFolder(config.run_dir).checkpoints)[-1] / "state.json").read_text())["state"]


def lines(config: TrainConfig, kind: str) -> list[int]:
    found = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in found if line["kind"] == kind]


def stopped(config: TrainConfig, after: int, recorder: Recorder | None = None) -> TrainState:
    """Train `after` steps. The stop is requested one step earlier, because the ranks agree one step late."""
    return train(config, stop=StopAfter(after - 1), sinks=[recorder] if recorder else [])


@pytest.mark.parametrize("first", [2, 3, 4, 5])
def test_a_run_stopped_after_any_step_resumes(config, first):
    recorder = Recorder()
    state = stopped(config, first, recorder)
    assert (state.step, state.stop_reason) == (first, "the test")
    assert RunFolder(config.run_dir).status().status == "stopped"
    state = stopped(config, 7 - first, recorder)
    assert state.step == 7
    assert [metrics.step for metrics in recorder.steps] == lines(config, "train") == [1, 2, 3, 4, 5, 6, 7]
    assert [metrics.epoch for metrics in recorder.epochs] == [0, 1, 2]
    assert lines(config, "epoch") == [2, 4, 6]


def test_an_epochs_last_step_and_its_end_are_both_saved(config):
    every_second = config.checkpoint.model_copy(update={"every_steps": STEPS_PER_EPOCH})
    config = config.model_copy(update={"epochs": 1, "checkpoint": every_second})
    train(config)
    state = newest(config)
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (2, 1, 0)
    assert state["best"] is not None
    assert (RunFolder(config.run_dir).checkpoints / "best").exists()


def test_file_logs_work_without_terminal_logs(config, capsys):
    stopped(config, 2)
    assert "Logging error" not in capsys.readouterr().err
    log = (RunFolder(config.run_dir).logs / "rank-0000.log").read_text()
    assert "global batch 16" in log


def with_shards(config: TrainConfig, shards: int) -> TrainConfig:
    return config.model_copy(update={"exact": config.exact.model_copy(update={"shards": shards})})


def bits(config: TrainConfig) -> dict:
    """The recorded metadata that the last attempt's bits depend on."""
    lines = (Path(config.run_dir) / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if json.loads(line)["event"] == "started"][-1]["bits"]


def log_of(config: TrainConfig) -> str:
    return (RunFolder(config.run_dir).logs / "rank-0000.log").read_text()


def test_resuming_needs_the_same_number_of_shards(config):
    stopped(config, 2)
    assert bits(config)["shards"] == 8
    for shards in (4, 0):
        with pytest.raises(InputError, match=rf"exact\.shards = {shards}: this run was started with 8"):
            stopped(with_shards(config, shards), 2)
    assert newest(config)["step"] == 2
    assert stopped(with_shards(config, 8), 2).step == 4


def test_exact_bits_do_not_depend_on_processes_and_threads(config):
    stopped(config, 2)
    kernels = determinism.kernel_metadata(torch.device("cpu"))
    assert kernels.keys() >= {"device", "instructions", "ATen's CPU capability"}
    assert bits(config).keys() == {"shards", "versions", *kernels}
    fast = with_shards(config, 0).model_copy(update={"run_dir": config.run_dir / "fast"})
    stopped(fast, 2)
    assert bits(fast).keys() == {"shards", "engine", "versions", "world_size", "threads", *kernels}
    assert (bits(fast)["shards"], bits(fast)["world_size"], bits(fast)["threads"]) == (0, 1, 1)


def test_a_changed_kernel_variable_is_reported(config, monkeypatch):
    stopped(config, 2)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    stopped(config, 2)
    assert "resuming with a different ONEDNN_MAX_CPU_ISA: not set before, AVX2 now; bits may differ" in log_of(config)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    stopped(config, 2)
    assert "resuming with a different ONEDNN_MAX_CPU_ISA: AVX2 before, not set now; bits may differ" in log_of(config)


def test_a_changed_number_of_threads_matters_in_fast_mode_only(config):
    fast = with_shards(config, 0).model_copy(update={"run_dir": config.run_dir / "fast"})
    for each in (config, fast):
        stopped(each, 2)
        stopped(each.model_copy(update={"threads": 2}), 2)
    assert "resuming with a different threads: 1 before, 2 now; bits may differ" in log_of(fast)
    assert "bits may differ" not in log_of(config)


def test_the_number_of_threads_does_not_change_the_bits(config):
    ended = []
    for threads in (1, 2, 3, 8):
        each = config.model_copy(update={"threads": threads, "epochs": 1, "run_dir": config.run_dir / str(threads)})
        train(each)
        (line,) = (each.run_dir / "digests.jsonl").read_text().splitlines()
        ended.append(json.loads(line)["tensors"])
    assert len(ended[0]) > 60
    assert ended == [ended[0]] * 4


def test_idle_threads_are_reported(config):
    few = with_shards(config, 2)
    stopped(few.model_copy(update={"threads": 5}), 2)
    assert "3 of 5 threads per rank are idle" in log_of(few)
    enough = few.model_copy(update={"threads": 2, "run_dir": config.run_dir / "enough"})
    stopped(enough, 2)
    assert "are idle" not in log_of(enough)


@pytest.mark.parametrize("how", ["superseded", "removed"])
def test_an_attempt_that_lost_its_folder_ends_at_the_next_line(config, how):
    run = RunFolder(config.run_dir)

    class AtTwelve(Recorder):
        def log_step(self, metrics: TrainMetrics) -> None:
            super().log_step(metrics)
            if metrics.step == 12 and how == "removed":
                shutil.rmtree(run.path)
            elif metrics.step == 12:
                (run.path / "attempt.json").write_text('{"token": "another", "pid": 7, "host": "there"}')

    profiled = config.logging.model_copy(update={"profile_steps": 100})
    config, recorder = config.model_copy(update={"logging": profiled, "epochs": 20}), AtTwelve()
    message = "was taken over by process 7 on there" if how == "superseded" else "the run folder was removed"
    with pytest.raises(StorageError, match=message):
        train(config, sinks=[recorder])
    assert [metrics.step for metrics in recorder.steps] == list(range(1, 13))
    if how == "superseded":
        assert lines(config, "train") == list(range(1, 13))
        assert not run.profile.exists()
        assert run.status().status == "running"
    else:
        assert not run.path.exists()


def test_the_status_of_a_running_attempt_shows_its_progress(config, monkeypatch):
    monkeypatch.setattr(claim, "PROGRESS_SECONDS", 0.0)
    run, shown = RunFolder(config.run_dir), list[int]()

    class StatusReader(Recorder):
        def log_step(self, metrics: TrainMetrics) -> None:
            assert run.status().status == "running"
            shown.append(run.status().step)

    train(config, sinks=[StatusReader()])
    assert shown[0] == 1
    assert shown == sorted(shown)
    assert len(set(shown)) > 2  # not every step: `progress` does not wait while a save writes the status
