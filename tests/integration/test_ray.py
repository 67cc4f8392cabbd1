"""launch.ray_train on a real Ray cluster: lost workers, nodes and drivers do not change the bits."""

import json
import re
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from kit.abuse import call
from kit.cluster import wait_for
from kit.commands import (
    NARROW,
    ROOT,
    Command,
    alone,
    assert_same_bits,
    attempts,
    final_tensors,
    has_saved,
    kill,
    metrics,
    status,
    torchrun,
)
from kit.own_networks import write_networks
from kit.ray_nodes import RayCluster
from kit.slow_sink import SLOW

from launch.slurm.task import task_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
CPU = ("--device", "cpu")
EPOCHS = ("configs/debug.toml", "--epochs", 16, "--logging.every_steps", 2, *NARROW, *CPU)
LONG = (*EPOCHS, "--checkpoint.every_steps", 5, "--checkpoint.keep_last", 2)
SHORT = ("configs/debug.toml", "--epochs", 1, "--data.train_samples", 200, "--data.test_samples", 60, *CPU)
WANDB = ("--logging.wandb.mode", "offline") if find_spec("wandb") else ()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, without Ray."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(alone(*LONG, "--threads", 1, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait(200) == 0, command.text
    return run


def wait_for_attempt(command: Command, run: Path, *, count: int = 1) -> None:
    """Wait until `count` attempts have started and the last one has saved."""
    command.wait_for(partial(has_saved, run, attempt=count), what=f"attempt {count}")


def pid_of(command: Command, rank: int) -> int:
    """Return the pid of the rank's newest worker."""
    command.wait_for(lambda: f"rank {rank} of " in command.text, what="the worker's first line")
    return int(re.findall(rf"rank {rank} of \d+: process (\d+)", command.text)[-1])


def sizes(run: Path) -> list[int]:
    return [attempt["world_size"] for attempt in attempts(run, "started")]


def test_every_engine_trains_with_the_usual_run_folder(cluster: RayCluster, tmp_path: Path) -> None:
    """All other tests here use ddp."""
    cluster.set_nodes("n1", "n2")
    runs = {name: tmp_path / name for name in ("fsdp", "deepspeed")}
    for name, run in runs.items():
        more = ("--engine.zero_stage", 3, *WANDB) if name == "deepspeed" else ()
        with cluster.train(
            *SHORT, "--engine.name", name, *more, "--run_dir", run, output=tmp_path / f"{name}.out"
        ) as command:
            assert command.wait(200) == 0, command.text
        assert (status(run)["status"], status(run)["world_size"]) == ("finished", 2)
    assert len(list(runs["deepspeed"].glob("wandb/offline-run-*/*.wandb"))) == bool(WANDB)  # by rank 0 only
    reference = tmp_path / "torchrun"
    with Command(
        torchrun(2, *SHORT, "--threads", 1, "--run_dir", reference), output=tmp_path / "torchrun.out"
    ) as command:
        assert command.wait(200) == 0, command.text
    assert_same_bits(runs["fsdp"], reference)
    ours, theirs = ({str(path.relative_to(run)) for path in run.rglob("*")} for run in (runs["fsdp"], reference))
    assert {name for name in ours ^ theirs if not name.startswith("ray")} == set()
    reported = json.loads((runs["fsdp"] / "ray/checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    epoch = [line for line in metrics(reference) if line["kind"] == "epoch"][-1]
    assert reported[-1]["metrics"]["test_loss"] == epoch["test"]["loss"]
    assert reported[-1]["metrics"]["world_size"] == 2


def test_a_network_is_found_in_the_folder_of_the_driver(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.set_nodes("n1", "n2")
    write_networks(tmp_path)
    run, settings = tmp_path / "run", (ROOT / SHORT[0], *SHORT[1:], "--exact.shards", 0)
    network = ("--model.name", "own_networks:make", "--model.options.width", 4)
    output = tmp_path / "output"
    with cluster.train(*settings, *network, "--run_dir", run, output=output, cwd=tmp_path) as command:
        assert command.wait(200) == 0, command.text
    assert (status(run)["status"], status(run)["world_size"]) == ("finished", 2)
    assert final_tensors(run)["model.conv.weight"].shape == (4, 3, 3, 3)


def test_an_elastic_run_survives_lost_and_new_nodes(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    """A worker is killed; a new node without the run folder is excluded; a node is drained; a node is lost, and one worker
    resumes alone; another node joins, and the run grows."""
    cluster.set_nodes("n1", "n2", "n3")
    run, settings = tmp_path / "run", ("--scaling.min_workers", 1, "--scaling.resize_seconds", 2)
    with cluster.train(*LONG, *SLOW, *settings, "--run_dir", run, output=tmp_path / "output") as command:
        wait_for_attempt(command, run)
        kill(pid_of(command, 1))
        cluster.add("n4", hidden=run)
        wait_for_attempt(command, run, count=2)
        drained, lost = (node for node in ("n1", "n2", "n3") if cluster.is_used(node))
        cluster.drain(drained)
        wait_for_attempt(command, run, count=3)
        cluster.kill(lost)
        wait_for_attempt(command, run, count=4)
        assert not cluster.is_used("n4")
        cluster.add("n5")
        assert command.wait(200) == 0, command.text
    assert sizes(run) == [2, 2, 2, 1, 2], command.text
    assert "excluded until Ray is restarted there" in command.text
    assert f"run_dir = {run} is not shared" in command.text
    stopped, started = attempts(run, "stopped"), attempts(run, "started")
    assert "the drain of node" in stopped[0]["reason"]
    assert stopped[1]["reason"] == "the driver, to resume on more workers"
    assert [started[2]["step"], started[4]["step"]] == [line["step"] for line in stopped], "no step was lost by either"
    assert_same_bits(run, undisturbed)


def test_after_the_driver_is_killed_the_same_command_resumes(
    cluster: RayCluster, undisturbed: Path, tmp_path: Path
) -> None:
    cluster.set_nodes("n1", "n2")
    run = tmp_path / "run"
    with cluster.train(*LONG, *SLOW, "--run_dir", run, output=tmp_path / "killed") as command:
        wait_for_attempt(command, run)
        kill(command.process.pid)
    cluster.kill("n2")
    (run / "ray/checkpoint_manager_snapshot.json").write_text("")  # Ray's list, as if the kill had cut it off
    with cluster.train(*LONG, "--run_dir", run, output=tmp_path / "output") as command:
        command.wait_for(lambda: "waiting up to 60 s for more" in command.text, what="the lack of capacity")
        cluster.add("n3", wait=False)
        command.wait_for(lambda: any(run.glob(".node-*")), what="the check of the nodes")
        cluster.kill("n3")
        cluster.add("n4")
        assert command.wait(200) == 0, command.text
    assert "was lost during its check" in command.text
    assert sizes(run) == [2, 2]
    assert_same_bits(run, undisturbed)


def submit(cluster: RayCluster, name: str, *arguments: object, fails: bool = False) -> str:
    """Run `ray job submit` as in the documentation, and return its output."""
    return cluster.run("job", "submit", "--submission-id", name, "--runtime-env", "launch/ray_job.yaml", "--working-dir", ".",
                       *arguments, fails=fails)  # fmt: skip


def test_a_stopped_job_loses_nothing_and_resumes(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    cluster.set_nodes("n1", "n2")
    run = tmp_path / "run"
    # This run saves only at the end of an epoch and at the stop.
    train = ("--", "python", "-m", "launch.ray_train", *EPOCHS, "--run_dir", run)
    submit(cluster, "first", "--no-wait", *train, *SLOW)
    wait_for(lambda: run.exists() and len(attempts(run, "started")) > 0 and status(run)["step"] > 0, seconds=90,
             description=lambda: cluster.run("job", "logs", "first"))  # fmt: skip
    cluster.run("job", "stop", "first")
    stopped = attempts(run, "stopped")
    assert [line["reason"] for line in stopped] == ["SIGTERM"]

    text = submit(cluster, "again", *train)
    assert attempts(run, "started")[1]["step"] == stopped[0]["step"], "no step was lost"
    assert_same_bits(run, undisturbed)
    lines = [line.partition(") ")[2] for line in text.splitlines() if line.startswith("(RayTrainWorker")]
    assert sum(" of 2: process " in line for line in lines) == 2, text  # both ranks print
    progress = [line for line in lines if " step " in line]
    assert len(progress) == len(set(progress)) > 10, text
    plain = "".join(
        line for line in text.splitlines(keepends=True) if " cli.py:" not in line
    )  # which Ray always colors
    assert not {"\r", "\x1b"} & set(plain), text

    refused = submit(
        cluster, "wrong", "--", "python", "-m", "launch.ray_train", "configs/debug.toml", "--device", "cpu", fails=True
    )
    assert "run_dir = runs/debug: relative, but a worker runs in a folder of its own" in refused
    listed = submit(cluster, "list", "--", "python", "-c", "import os; print(sorted(os.listdir()))")
    assert "'distributed'" in listed
    assert not {"'.venv'", "'runs'", "'data'", "'.git'"} & set(re.findall(r"'[^']*'", listed))


def test_failures_that_would_repeat_end_the_run_at_once(cluster: RayCluster, tmp_path: Path) -> None:
    cluster.set_nodes("n1", "n2")
    large = ("--scaling.num_workers", 3, "--scaling.wait_seconds", 0)
    with cluster.train(*SHORT, *large, "--run_dir", tmp_path / "large", output=tmp_path / "large.out") as command:
        assert command.wait(200) == 2, command.text
    assert "scaling.num_workers = 3: the cluster has capacity for 2 workers of 1 CPU each (pack)" in command.text
    assert not (tmp_path / "large").exists()

    infinite = ("--optim.lr", 100, "--optim.momentum", 0.99, "--schedule.name", "constant", "--epochs", 20, *CPU)
    run = tmp_path / "infinite"
    with cluster.train("configs/debug.toml", *infinite, "--run_dir", run, output=tmp_path / "infinite.out") as command:
        assert command.wait(200) == 3, command.text
    assert len(attempts(run, "started")) == 1, "an error that would repeat is not retried"

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    cluster.kill("n2")
    cluster.add("n4", hidden=hidden)
    with cluster.train(*SHORT, "--run_dir", hidden / "run", output=tmp_path / "hidden.out") as command:
        assert command.wait(200) == 2, command.text
    assert f"run_dir = {hidden / 'run'} is not shared" in command.text
    assert "Traceback" not in command.text
    sweep = ("--sweep.optim.lr", "0.1,0.01", "--run_dir", hidden / "sweep")
    with cluster.train(*SHORT, *sweep, output=tmp_path / "sweep.out") as command:
        assert command.wait(200) == 2, command.text
    assert f"run_dir = {hidden / 'sweep/optim.lr=0.1'} is not shared" in command.text
    # Not any traceback: Ray may stop a trial while its interpreter runs a finalizer, and that prints one.
    assert f"{ROOT}/launch" not in command.text, "a traceback of this package"


def test_a_sweep_trains_all_and_names_the_best(cluster: RayCluster, tmp_path: Path) -> None:
    """A random sweep, whose first trial a task of a Slurm array has trained already."""
    cluster.set_nodes("n1", "n2")
    random = ("--sweep.optim.lr", "log_uniform(1e-6, 0.1)", "--trials", 3, "--sweep.trial_seed", 4)
    arguments = (*SHORT, *random, "--run_dir", tmp_path / "sweep")
    tasks = [task_of([str(word) for word in arguments], index) for index in range(3)]
    first = call("train", *tasks[0].arguments)
    assert first.code == 0, first.err
    with cluster.train(*arguments, "--scaling.num_workers", 1, output=tmp_path / "output") as command:
        assert command.wait(200) == 0, command.text
    names = [Path(task.arguments[-1]).name for task in tasks]
    assert [name for name in names if f"starting {name}" in command.text] == names[1:], command.text
    assert sorted(path.name for path in (tmp_path / "sweep").glob("*=*")) == sorted(names)
    table = (tmp_path / "sweep/summary.txt").read_text()
    for name in names:
        assert status(tmp_path / "sweep" / name)["status"] == "finished"
        assert re.search(rf"^{name} +finished", table, re.M)
    best = (tmp_path / "sweep/best.toml").read_text()
    name = best.splitlines()[0].removeprefix("# ").partition(":")[0]
    assert table.splitlines()[1].startswith(f"{name} "), "the best one comes first"
    assert f"\nlr = {float(name.removeprefix('optim.lr='))}\n" in best
    assert f"best: {name}, " in command.text
    assert (tmp_path / "sweep/sweep.png").stat().st_size > 10_000
    assert "repeated" not in command.text, "equal lines of two trainings are not folded"
    assert "\x1b" not in command.text
    with cluster.train(*arguments, "--scaling.num_workers", 1, output=tmp_path / "again") as command:
        assert command.wait(200) == 0, command.text
    assert "starting" not in command.text, "a finished training is not repeated"
