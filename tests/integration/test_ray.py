"""launch.ray_train on a real Ray cluster: workers, nodes and drivers are lost, come and go; the bits stay the same."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.commands import Command, assert_same_bits, attempts, kill, metrics, status, torchrun
from integration.ray_nodes import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
LONG = ("configs/debug.toml", "--epochs", 20, "--checkpoint.every_steps", 5, "--checkpoint.keep_last", 2)
SHORT = ("configs/debug.toml", "--epochs", 1, "--data.train_samples", 200, "--data.test_samples", 60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one process, without Ray."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(torchrun(1, *LONG, "--threads", 1, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return run


def begun(command: Command, run: Path, *, count: int = 1, saves: int = 1) -> None:
    """Wait until that many attempts have begun and the last of them has saved."""

    def there() -> bool:
        lines = attempts(run, "started")
        return len(lines) >= count and status(run)["step"] >= lines[-1]["step"] + 5 * saves

    command.wait_for(there, what=f"attempt {count}")


def pid_of(command: Command, rank: int) -> int:
    """Of the newest worker of that rank."""
    command.wait_for(lambda: f"rank {rank} of " in command.text, what="the worker's first line")
    return int(re.findall(rf"rank {rank} of \d+: process (\d+)", command.text)[-1])


def sizes(run: Path) -> list[int]:
    return [attempt["world_size"] for attempt in attempts(run, "started")]


def test_every_engine_trains_and_the_run_folder_looks_as_ever(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.have("n1", "n2")
    runs = {name: tmp_path / name for name in ("ddp", "fsdp", "deepspeed")}
    for name, run in runs.items():
        more = ("--engine.zero_stage", 3) if name == "deepspeed" else ()
        with cluster.train(
            *SHORT, "--engine.name", name, *more, "--run_dir", run, output=tmp_path / f"{name}.out"
        ) as command:
            assert command.wait() == 0, command.text
        assert (status(run)["status"], status(run)["world_size"]) == ("finished", 2)
    reference = tmp_path / "torchrun"
    with Command(
        torchrun(2, *SHORT, "--threads", 1, "--run_dir", reference), output=tmp_path / "torchrun.out"
    ) as command:
        assert command.wait() == 0, command.text
    assert_same_bits(runs["ddp"], reference)
    assert_same_bits(runs["fsdp"], reference)
    ours, theirs = ({str(path.relative_to(run)) for path in run.rglob("*")} for run in (runs["ddp"], reference))
    assert {name for name in ours ^ theirs if not name.startswith("ray")} == set()
    told = json.loads((runs["ddp"] / "ray/checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    epoch = [line for line in metrics(reference) if line["kind"] == "epoch"][-1]
    assert told[-1]["metrics"]["test_loss"] == epoch["test"]["loss"]
    assert told[-1]["metrics"]["world_size"] == 2


def test_a_killed_worker_and_a_killed_node(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    cluster.have("n1", "n2")
    run = tmp_path / "run"
    with cluster.train(*LONG, "--run_dir", run, output=tmp_path / "output") as command:
        begun(command, run)
        kill(pid_of(command, 1))
        begun(command, run, count=2)
        cluster.kill("n2")
        cluster.add("n3")  # the run waits for a node in its place
        assert command.wait() == 0, command.text
    assert len(attempts(run, "started")) >= 3, command.text
    assert set(sizes(run)) == {2}
    assert_same_bits(run, undisturbed)


def test_two_workers_then_one_then_two_again(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    """A node is lost, the run goes on with one worker, a node comes, and the run is stopped and grows with nothing lost."""
    cluster.have("n1", "n2")
    run, settings = tmp_path / "run", ("--scaling.min_workers", 1, "--scaling.resize_seconds", 2)
    with cluster.train(*LONG, *settings, "--run_dir", run, output=tmp_path / "output") as command:
        begun(command, run)
        cluster.kill("n2")
        begun(command, run, count=2)
        cluster.add("n3")
        assert command.wait(180) == 0, command.text
    assert sizes(run) == [2, 1, 2], command.text
    grown = attempts(run, "stopped")[-1]
    assert grown["reason"] == "the driver, to go on with more workers"
    assert attempts(run, "started")[2]["step"] == grown["step"], "no step was lost"
    assert_same_bits(run, undisturbed)


def test_a_drained_node_is_left_with_nothing_lost(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    cluster.have("n1", "n2", "n3")
    run = tmp_path / "run"
    with cluster.train(*LONG, "--run_dir", run, output=tmp_path / "output") as command:
        begun(command, run)
        used = [node for node in ("n1", "n2", "n3") if cluster.is_used(node)]
        cluster.drain(used[0])
        assert command.wait() == 0, command.text
    stopped = attempts(run, "stopped")
    assert "the drain of node" in stopped[0]["reason"]
    assert attempts(run, "started")[1]["step"] == stopped[0]["step"], "no step was lost"
    assert_same_bits(run, undisturbed)
    cluster.kill(used[0])


def test_a_killed_driver_and_the_same_command_again(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    cluster.have("n1", "n2")
    run = tmp_path / "run"
    for strike in range(2):
        with cluster.train(*LONG, "--run_dir", run, output=tmp_path / "output") as command:
            if strike == 0:
                begun(command, run)
                kill(command.process.pid)
            else:
                assert command.wait() == 0, command.text
    assert len(attempts(run, "started")) == 2
    assert_same_bits(run, undisturbed)
