"""launch.ray_train on a real Ray cluster: workers, nodes and drivers are lost, come and go; the bits stay the same."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import cluster as slurm
from kit.cluster import wait_for
from kit.commands import ROOT, Command, assert_same_bits, attempts, kill, metrics, status, torchrun
from kit.ray_nodes import RayCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
LONG = (
    "configs/debug.toml",
    "--epochs",
    16,
    "--checkpoint.every_steps",
    5,
    "--checkpoint.keep_last",
    2,
    "--device",
    "cpu",
)
SHORT = ("configs/debug.toml", "--epochs", 1, "--data.train_samples", 200, "--data.test_samples", 60, "--device", "cpu")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one process, without Ray."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(torchrun(1, *LONG, "--threads", 1, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait(200) == 0, command.text
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
    """ddp is the engine of all other tests here."""
    cluster.have("n1", "n2")
    runs = {name: tmp_path / name for name in ("fsdp", "deepspeed")}
    for name, run in runs.items():
        more = ("--engine.zero_stage", 3) if name == "deepspeed" else ()
        with cluster.train(
            *SHORT, "--engine.name", name, *more, "--run_dir", run, output=tmp_path / f"{name}.out"
        ) as command:
            assert command.wait(200) == 0, command.text
        assert (status(run)["status"], status(run)["world_size"]) == ("finished", 2)
    reference = tmp_path / "torchrun"
    with Command(
        torchrun(2, *SHORT, "--threads", 1, "--run_dir", reference), output=tmp_path / "torchrun.out"
    ) as command:
        assert command.wait(200) == 0, command.text
    assert_same_bits(runs["fsdp"], reference)
    ours, theirs = ({str(path.relative_to(run)) for path in run.rglob("*")} for run in (runs["fsdp"], reference))
    assert {name for name in ours ^ theirs if not name.startswith("ray")} == set()
    told = json.loads((runs["fsdp"] / "ray/checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    epoch = [line for line in metrics(reference) if line["kind"] == "epoch"][-1]
    assert told[-1]["metrics"]["test_loss"] == epoch["test"]["loss"]
    assert told[-1]["metrics"]["world_size"] == 2


def test_an_elastic_run_through_all_that_can_happen_to_workers_and_nodes(
    cluster: RayCluster, undisturbed: Path, tmp_path: Path
) -> None:
    """A worker is killed; a node comes that does not see the run folder, and is left out; a node is drained; a node is
    lost, and one worker goes on alone; another node comes, and the run grows."""
    cluster.have("n1", "n2", "n3")
    run, settings = tmp_path / "run", ("--scaling.min_workers", 1, "--scaling.resize_seconds", 2)
    with cluster.train(*LONG, *settings, "--run_dir", run, output=tmp_path / "output") as command:
        begun(command, run)
        kill(pid_of(command, 1))
        cluster.add("n4", hidden=run)
        begun(command, run, count=2)
        drained, lost = (node for node in ("n1", "n2", "n3") if cluster.is_used(node))
        cluster.drain(drained)
        begun(command, run, count=3)
        cluster.kill(lost)
        begun(command, run, count=4)
        assert not cluster.is_used("n4")
        cluster.add("n5")
        assert command.wait(200) == 0, command.text
    assert sizes(run) == [2, 2, 2, 1, 2], command.text
    assert "left out, unless it joins the cluster anew" in command.text
    assert f"run_dir = {run} is not shared" in command.text
    stopped, started = attempts(run, "stopped"), attempts(run, "started")
    assert "the drain of node" in stopped[0]["reason"]
    assert stopped[1]["reason"] == "the driver, to go on with more workers"
    assert [started[2]["step"], started[4]["step"]] == [line["step"] for line in stopped], "no step was lost by either"
    assert_same_bits(run, undisturbed)


def test_a_killed_driver_and_the_same_command_again_on_another_node(
    cluster: RayCluster, undisturbed: Path, tmp_path: Path
) -> None:
    cluster.have("n1", "n2")
    run = tmp_path / "run"
    with cluster.train(*LONG, "--run_dir", run, output=tmp_path / "killed") as command:
        begun(command, run)
        kill(command.process.pid)
    cluster.kill("n2")
    with cluster.train(*LONG, "--run_dir", run, output=tmp_path / "output") as command:
        command.wait_for(lambda: "waiting up to 60 s for it" in command.text, what="that there is no room")
        cluster.add("n3", wait=False)
        command.wait_for(lambda: any(run.glob(".node-*")), what="that nodes are asked")
        cluster.kill("n3")
        cluster.add("n4")
        assert command.wait(200) == 0, command.text
    assert "was lost while it was asked" in command.text
    assert sizes(run) == [2, 2]
    assert_same_bits(run, undisturbed)


def submitted(cluster: RayCluster, name: str, *words: object, fails: bool = False) -> str:
    """What `ray job submit` says of a training that it waits for, as the documentation writes it."""
    return cluster.ask("job", "submit", "--submission-id", name, "--runtime-env", "launch/ray_job.yaml", "--working-dir", ".",
                       *words, fails=fails)  # fmt: skip


def test_a_job_is_stopped_with_nothing_lost_and_submitted_again(
    cluster: RayCluster, undisturbed: Path, tmp_path: Path
) -> None:
    cluster.have("n1", "n2")
    run = tmp_path / "run"
    # Saves come only at the ends of epochs, and at the stop.
    train = ("--", "python", "-m", "launch.ray_train", *LONG[:3], "--device", "cpu", "--run_dir", run)
    submitted(cluster, "first", "--no-wait", *train)
    wait_for(lambda: run.exists() and len(attempts(run, "started")) > 0 and status(run)["step"] > 0, seconds=90,
             what=lambda: cluster.ask("job", "logs", "first"))  # fmt: skip
    cluster.ask("job", "stop", "first")
    stopped = attempts(run, "stopped")
    assert [line["reason"] for line in stopped] == ["SIGTERM"]

    text = submitted(cluster, "again", *train)
    assert attempts(run, "started")[1]["step"] == stopped[0]["step"], "no step was lost"
    assert_same_bits(run, undisturbed)
    lines = [line.partition(") ")[2] for line in text.splitlines() if line.startswith("(RayTrainWorker")]
    assert sum(" of 2: process " in line for line in lines) == 2, text  # both ranks are heard
    progress = [line for line in lines if " step " in line]
    assert len(progress) == len(set(progress)) > 10, text
    told = "".join(line for line in text.splitlines(keepends=True) if " cli.py:" not in line)  # which Ray always colors
    assert not {"\r", "\x1b"} & set(told), text

    refused = submitted(
        cluster, "wrong", "--", "python", "-m", "launch.ray_train", "configs/debug.toml", "--device", "cpu", fails=True
    )
    assert "run_dir = runs/debug: relative, and a worker runs in a folder of its own" in refused
    there = submitted(cluster, "look", "--", "python", "-c", "import os; print(sorted(os.listdir()))")
    assert "'distributed'" in there
    assert not {"'.venv'", "'runs'", "'data'", "'.git'"} & set(re.findall(r"'[^']*'", there))


def test_more_than_there_is_room_for_and_what_would_fail_again(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.have("n1", "n2")
    large = ("--scaling.num_workers", 3, "--scaling.wait_seconds", 0)
    with cluster.train(*SHORT, *large, "--run_dir", tmp_path / "large", output=tmp_path / "large.out") as command:
        assert command.wait(200) == 2, command.text
    assert "3 workers of 1 CPU each are asked for (pack), and the cluster has room for 2 now" in command.text
    assert not (tmp_path / "large").exists()

    infinite = (
        "--optim.lr",
        100,
        "--optim.momentum",
        0.99,
        "--schedule.name",
        "constant",
        "--epochs",
        20,
        "--device",
        "cpu",
    )
    run = tmp_path / "infinite"
    with cluster.train("configs/debug.toml", *infinite, "--run_dir", run, output=tmp_path / "infinite.out") as command:
        assert command.wait(200) == 3, command.text
    assert len(attempts(run, "started")) == 1, "what would repeat is not tried again"

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    cluster.kill("n2")
    cluster.add("n4", hidden=hidden)
    with cluster.train(*SHORT, "--run_dir", hidden / "run", output=tmp_path / "hidden.out") as command:
        assert command.wait(200) == 2, command.text
    assert f"run_dir = {hidden / 'run'} is not shared" in command.text
    assert "Traceback" not in command.text


def test_a_sweep_trains_each_and_names_the_best(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.have("n1", "n2")
    words = (*SHORT, "--sweep.optim.lr", "0.1,0.000001", "--scaling.num_workers", 1, "--run_dir", tmp_path / "sweep")
    with cluster.train(*words, output=tmp_path / "output") as command:
        assert command.wait(200) == 0, command.text
    for name in ("optim.lr=0.1", "optim.lr=0.000001"):
        assert status(tmp_path / "sweep" / name)["status"] == "finished"
        assert re.search(rf"^{name} +finished", (tmp_path / "sweep/summary.txt").read_text(), re.M)
    best = (tmp_path / "sweep/best.toml").read_text()
    assert re.search(r"^lr = (0\.1|1e-06)$", best, re.M)
    assert f"best: {best.splitlines()[0].removeprefix('# ').partition(':')[0]}" in command.text
    assert (tmp_path / "sweep/sweep.png").stat().st_size > 10_000
    assert "repeated" not in command.text, "lines of two trainings that are alike are not folded"
    assert "\x1b" not in command.text
    with cluster.train(*words, output=tmp_path / "again") as command:
        assert command.wait(200) == 0, command.text
    assert "begins" not in command.text, "what is finished is not trained again"


@pytest.mark.skipif(bool(slurm.why_none()), reason=f"no Slurm here: {slurm.why_none()}")
def test_the_same_bits_under_every_launcher(cluster: RayCluster, tmp_path: Path) -> None:
    """python alone, torchrun on 2 processes, sbatch on 2 nodes, Ray on 3 workers; a thread each."""
    words = ("configs/debug.toml", "--threads", 1, "--device", "cpu", "--run_dir")
    runs = {name: tmp_path / name for name in ("python", "torchrun", "slurm", "ray")}
    python = [sys.executable, "-m", "distributed.train", *map(str, words), str(runs["python"])]
    for command in (
        Command(python, output=tmp_path / "python.out"),
        Command(torchrun(2, *words, runs["torchrun"]), output=tmp_path / "torchrun.out"),
    ):
        with command:
            assert command.wait(200) == 0, command.text
    (tmp_path / "nodes").mkdir()
    with slurm.Cluster(tmp_path / "nodes") as two:
        job = two.sbatch(
            "--nodes=2", "--output", tmp_path / "slurm.out", ROOT / "slurm/train.sh", *words, runs["slurm"]
        )
        assert two.wait_for_state(job, "COMPLETED", "FAILED", seconds=200) == "COMPLETED", (
            tmp_path / "slurm.out"
        ).read_text()
    cluster.have("n1", "n2", "n3")
    with cluster.train(*words, runs["ray"], "--scaling.num_workers", 3, output=tmp_path / "ray.out") as command:
        assert command.wait(200) == 0, command.text
    assert [sizes(run) for run in runs.values()] == [[1], [2], [2], [3]]
    for run in runs.values():
        assert_same_bits(run, runs["python"])
