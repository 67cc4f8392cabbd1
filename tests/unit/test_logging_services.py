"""Weights & Biases in its offline folder, MLflow in a database without a server: resumed runs and how they ended."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kit.mlflow_server import history, only_run
from kit.small_runs import StopAfter, small_config

from distributed.config import TrainConfig
from distributed.config.sinks import Wandb
from distributed.errors import InputError
from distributed.gpu_check.processes import free_port
from distributed.metrics import follower, wandb_sink
from distributed.metrics.parameters import parameters_of
from distributed.metrics.wandb_file import records_in, rows_in
from distributed.recipe import train
from distributed.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("restore_threads_and_log", "patient")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating a database takes long on a busy machine."""
    for status in follower.CLOSE_SECONDS:
        monkeypatch.setitem(follower.CLOSE_SECONDS, status, 60.0)


def wandb_config(run_dir: Path, **settings: Any) -> TrainConfig:
    pytest.importorskip("wandb", reason="wandb is not installed")
    logging = {"wandb": {"project": "tests", "tags": ["one", "two"], "mode": "offline"}}
    return logged(small_config(run_dir, data={"validation_fraction": 0.2}, **settings), **logging)


def mlflow_config(run_dir: Path, **settings: Any) -> TrainConfig:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="sqlalchemy is not installed")
    uri = f"sqlite:///{run_dir.parent}/mlflow.db"
    config = small_config(run_dir, data={"validation_fraction": 0.2}, **settings)
    return logged(config, mlflow={"tracking_uri": uri, "experiment": "tests", "name": "a run"})


def logged(config: TrainConfig, **more: Any) -> TrainConfig:
    values = json.loads(config.model_dump_json())
    values["logging"] |= more
    return TrainConfig.model_validate(values)


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for file in wandb_files(run_dir) for row in rows_in(file)]


def exit_codes(run_dir: Path) -> list[int]:
    records = [record for file in wandb_files(run_dir) for record in records_in(file)]
    return [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]


def test_wandb_has_all_metrics_and_settings(tmp_path):
    config = wandb_config(tmp_path / "run")
    train(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    found = rows(config.run_dir)
    steps = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert {row["_step"]: row["train/loss"] for row in found} == steps
    accuracies = {line["step"]: line["validation"]["accuracy"] for line in lines if line["kind"] == "epoch"}
    assert {r["_step"]: r["validation/accuracy"] for r in found if "validation/accuracy" in r} == accuracies
    (run,) = [r.run for r in records_in(wandb_files(config.run_dir)[0]) if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("tests", "run", ["one", "two"])
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings.items() >= parameters_of(config).items()
    assert settings["optim.lr"] == 0.01
    assert exit_codes(config.run_dir) == [0]


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    # Under load, wandb takes more than its 4 s to finish a file; the next attempt would send the rest of the lines again.
    monkeypatch.setattr(wandb_sink, "_FINISH_SECONDS", 50.0)
    config = wandb_config(tmp_path / "run")
    for _ in range(2):
        train(config, stop=StopAfter(3))
    train(config)
    files = wandb_files(config.run_dir)
    assert len(files) == 3
    assert len({file.name for file in files}) == 1  # the run's id
    found = rows(config.run_dir)
    steps = [line["step"] for line in _lines(config, "train")]
    assert [row["_step"] for row in found if "train/loss" in row] == steps
    assert Counter(row["epoch"] for row in found if "epoch" in row) == {1: 1, 2: 1}
    assert exit_codes(config.run_dir) == [75, 75, 0]


def test_wandb_records_a_failure(tmp_path):
    class Fails:
        def requested(self) -> str | None:
            raise RuntimeError("a test")

    config = wandb_config(tmp_path / "run")
    with pytest.raises(RuntimeError, match="a test"):
        train(config, stop=Fails())
    assert exit_codes(config.run_dir) == [1]


def _lines(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_mlflow_continues_the_same_run(tmp_path):
    config = mlflow_config(tmp_path / "run")
    uri = str(config.logging.mlflow.tracking_uri)
    train(config, stop=StopAfter(3))
    run = only_run(uri, "tests")
    assert (run.info.status, run.data.tags["distributed.status"]) == ("KILLED", "stopped")
    train(config.model_copy(update={"threads": 2}))  # an operational setting, which MLflow would refuse to change
    run = only_run(uri, "tests")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.data.params["threads"] == "1"
    assert run.data.params["optim.lr"] == "0.01"
    assert run.data.params.keys() == parameters_of(config).keys()
    assert history(uri, "tests", "train/loss") == [(line["step"], line["loss"]) for line in _lines(config, "train")]
    epochs = [(line["step"], line["validation"]["accuracy"]) for line in _lines(config, "epoch")]
    assert history(uri, "tests", "validation/accuracy") == epochs


def test_the_identity_is_in_every_checkpoint(tmp_path):
    config = small_config(tmp_path / "run")
    train(config, stop=StopAfter(3))
    saved = RunFolder(config.run_dir).newest_state()["run"]
    (config.run_dir / "attempts.jsonl").unlink()  # as on a machine that resumes from a store
    train(config, stop=StopAfter(3))
    assert RunFolder(config.run_dir).newest_state()["run"] == saved
    other = config.model_copy(update={"run_dir": tmp_path / "other"})
    train(other, stop=StopAfter(3))
    assert RunFolder(other.run_dir).newest_state()["run"] != saved


def test_wandb_without_its_server_uses_a_folder(tmp_path, monkeypatch):
    config = wandb_config(tmp_path / "run")
    from distributed.metrics import wandb_sink

    monkeypatch.setattr(wandb_sink, "_START_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    train(logged(config, wandb={"project": "tests", "mode": "online"}))
    assert {row["_step"] for row in rows(config.run_dir)} == {line["step"] for line in _lines(config, "train")}
    log = (config.run_dir / "logs/rank-0000.log").read_text()
    assert log.count(" WARNING ") == 1
    assert "send it later with: wandb sync" in log
    assert "0" * 40 not in log


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WANDB_API_KEY": "cut off"}, "logging.wandb: .*; correct WANDB_API_KEY"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, None),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}, None),
    ],
)
def test_wandb_variables_are_checked_before_training(variables, message, tmp_path, monkeypatch):
    wandb_config(tmp_path / "run")
    from distributed.metrics.wandb_sink import check_credentials

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = Wandb(project="tests", mode="online")
    if message is None:
        check_credentials(config)
        return
    with pytest.raises(InputError, match=message) as caught:
        check_credentials(config)
    assert len(caught.value.lines) == 1


def test_an_mlflow_server_that_is_down_is_one_warning(tmp_path):
    config = mlflow_config(tmp_path / "run")
    url = f"http://127.0.0.1:{free_port()}"
    config = logged(config, mlflow={"tracking_uri": url})
    assert train(config).step == len(_lines(config, "train"))
    assert (config.run_dir / "logs/rank-0000.log").read_text().count(" WARNING ") == 1


def test_logging_does_not_change_the_bits(tmp_path):
    """It may also begin when a run resumes; then what came before is logged too."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = small_config(tmp_path / "plain")
    train(config)
    other = config.model_copy(update={"run_dir": tmp_path / "logged"})
    train(other, stop=StopAfter(3))
    train(logged(other, wandb={"mode": "offline"}))
    first, second = (RunFolder(c.run_dir).digests_file.read_text().splitlines()[-1] for c in (config, other))
    assert first == second
    assert [row["_step"] for row in rows(other.run_dir)] == [line["step"] for line in _lines(config, "train")]
