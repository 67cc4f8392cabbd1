"""Real commands that log to MLflow and Weights & Biases: killed, resumed, and with servers that are away."""

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kit.commands import Command, kill, metrics, status, torchrun
from kit.mlflow_server import MlflowServer, history, only_run
from kit.slow_sink import SLOW

from distributed.gpu_check.processes import free_port
from distributed.metrics.wandb_file import rows_in

pytestmark = pytest.mark.timeout(400)
SETTINGS = (
    "configs/debug.toml", "--data.train_samples", 60, "--data.test_samples", 20, "--global_batch_size", 10,
    "--schedule.name", "constant", "--evaluation.batch_size", 20, "--logging.every_steps", 1, "--device", "cpu",
    "--threads", 1, "--evaluation.test_every_epoch", "false",
)  # fmt: skip
SECRET = "5ecret" * 7
KEY = {
    "WANDB_API_KEY": SECRET[:40],
    "WANDB_DIR": "",
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_USERNAME": "me",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    for package in ("mlflow", "sqlalchemy"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with MlflowServer(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def training(run: Path, *arguments: object, ranks: int = 1, **more: str) -> Iterator[Command]:
    command = torchrun(ranks, *SETTINGS, "--run_dir", run, *arguments)
    with Command(command, output=run.with_suffix(".out"), more={**KEY, **more}) as started:
        yield started


def mlflow_at(server: MlflowServer, experiment: str) -> tuple[str, ...]:
    return ("--logging.mlflow.tracking_uri", server.url, "--logging.mlflow.experiment", experiment)


def steps_at(server: MlflowServer, experiment: str) -> list[int]:
    """The steps that the server has, in order, of all runs of the experiment."""
    return [step for step, _ in history(server.url, experiment, "train/lr")]


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if line["kind"] == kind]


def warnings(run: Path) -> list[str]:
    """The warnings in rank 0's log, without those about the data."""
    found = [line for line in (run / "logs/rank-0000.log").read_text().splitlines() if " WARNING " in line]
    return [line for line in found if "mlflow" in line.lower() or "wandb" in line]


def assert_no_secret(*folders: Path) -> None:
    for file in (path for folder in folders for path in [*folder.parent.glob("*.out"), *folder.rglob("*")]):
        if file.is_file():
            assert SECRET[:12].encode() not in file.read_bytes(), file


def test_a_killed_run_is_one_run_in_both_services(server: MlflowServer, tmp_path: Path) -> None:
    """Killed after it logged steps that no checkpoint has, then stopped, then finished: one run, each step once."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    run = tmp_path / "run"
    arguments = (
        *("--epochs", 24, *mlflow_at(server, "killed"), "--logging.wandb.mode", "offline"),
        *("--checkpoint.every_steps", 7, "--checkpoint.every_minutes", 0, "--checkpoint.max_overhead", 1e-9),
    )
    with training(run, *arguments, *SLOW, ranks=2) as command:

        def is_logged() -> bool:
            saved = status(run).get("saved_step", 0) if (run / "status.json").exists() else 0
            return saved >= 7 and lines(run, "train")[-1]["step"] > saved and bool(steps_at(server, "killed"))

        command.wait_for(is_logged, what="a step in MLflow that is not saved", every=0.2)
        kill(*command.ranks(), command.process.pid)
    before = steps_at(server, "killed")
    with training(run, *arguments, *SLOW) as command:
        command.wait_for(
            lambda: len(steps_at(server, "killed")) > len(before) + 3, what="more steps in MLflow", every=0.2
        )
        assert only_run(server.url, "killed").info.status == "RUNNING"
        kill(command.ranks()[0], number=signal.SIGTERM)
        command.wait()
    assert only_run(server.url, "killed").info.status == "KILLED"
    with training(run, *arguments) as command:
        assert command.wait() == 0, command.text
    assert only_run(server.url, "killed").info.status == "FINISHED"
    expected = [line["step"] for line in lines(run, "train")]
    assert steps_at(server, "killed") == expected
    assert [value for _, value in history(server.url, "killed", "epoch")] == list(range(1, 25))
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)
    assert len({file.name for file in files}) == 1
    rows = [row for file in files for row in rows_in(file)]
    assert sorted(row["_step"] for row in rows if "train/loss" in row) == expected
    assert Counter(row["epoch"] for row in rows if "epoch" in row) == Counter(range(1, 25))
    assert_no_secret(run)


def test_a_server_killed_in_the_middle_gets_the_rest(server: MlflowServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with training(run, "--epochs", 100, *mlflow_at(server, "outage"), *SLOW) as command:
        command.wait_for(lambda: (run / "metrics.jsonl").exists(), what="a line")
        command.wait_for(lambda: "MLflow: run " in command.text, what="the run in MLflow")
        server.kill()
        reached = status(run)["step"]
        command.wait_for(lambda: bool(warnings(run)), what="the warning")
        command.wait_for(lambda: len(lines(run, "train")) > reached + 5, what="steps without the server")
        server.start()
        command.wait_for(
            lambda: max(steps_at(server, "outage"), default=0) > reached + 5, what="steps after the outage", every=0.2
        )
        kill(command.ranks()[0], number=signal.SIGTERM)
        command.wait()
        assert status(run)["status"] == "stopped"
        assert len(warnings(run)) == 1
        assert "tried again" in warnings(run)[0]
        assert steps_at(server, "outage") == [line["step"] for line in lines(run, "train")]


def test_servers_that_do_not_answer_cost_one_warning(mute: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    run = tmp_path / "run"
    arguments = ("--epochs", 2, "--logging.mlflow.tracking_uri", mute, "--logging.wandb.project", "tests")
    with training(run, *arguments, WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}") as command:
        assert command.wait() == 0, command.text
    assert status(run)["status"] == "finished"
    assert len(lines(run, "train")) == 10
    found = warnings(run)
    assert len(found) == 2
    assert [sum(f" {name}: " in line for line in found) for name in ("MLflow", "wandb")] == [1, 1]
    assert_no_secret(run)
