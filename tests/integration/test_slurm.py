"""The scripts of slurm/ on a real two-node Slurm: preempted, requeued, bereft of a node, and the bits stay the same."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
from kit import cluster as slurm
from kit.cluster import Cluster, wait_for
from kit.commands import ROOT, Command, assert_same_bits, attempts, status, torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(slurm.why_none()), reason=f"no Slurm here: {slurm.why_none()}"),
]
CPU = ("--device", "cpu")
SMALL = ("--epochs", 1, "--data.train_samples", 300, "--data.test_samples", 60, "--global_batch_size", 32, *CPU)
LONG = ("configs/debug.toml", "--epochs", 8, "--checkpoint.every_steps", 5, "--checkpoint.keep_last", 2, *CPU)
OUT = ("--output", "batch-%j.out")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one process, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(torchrun(1, *LONG, "--threads", 1, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return run


TOGETHER: dict[str, Callable[..., None]] = {}


def together(story: Callable[..., None]) -> Callable[[dict[str, Future[None]]], None]:
    """A test that leaves the nodes as they are and mostly waits: some of these run beside each other in threads."""
    TOGETHER[story.__name__] = story

    def test(begun: dict[str, Future[None]]) -> None:
        begun[story.__name__].result()

    test.__name__, test.__doc__ = story.__name__, story.__doc__
    return test


@pytest.fixture(scope="module")
def begun(
    cluster: Cluster, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[None]]]:
    """Those tests that were asked for, by name."""
    asked = {item.name for item in request.session.items}
    with ThreadPoolExecutor(3) as pool:
        futures = {}
        for name, story in TOGETHER.items():
            given = {"cluster": cluster, "undisturbed": undisturbed, "tmp_path": tmp_path_factory.mktemp("together")}
            if name in asked:
                futures[name] = pool.submit(story, **{key: given[key] for key in signature(story).parameters})
        yield futures


def said(folder: Path) -> str:
    """All that the jobs of a folder had to say, for a test that fails."""
    files = [*folder.glob("*.out"), *folder.rglob("slurm/*.log")]
    return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in sorted(files))


def started(cluster: Cluster, run: Path, *, count: int, saves: int = 1) -> None:
    """Wait until that many attempts have begun and the last of them has saved."""

    def there() -> bool:
        begun = attempts(run, "started")
        return len(begun) >= count and status(run)["step"] >= begun[-1]["step"] + 5 * saves

    wait_for(there, seconds=90, what=lambda: f"attempt {count}\n{said(run.parent)}")


def restarted(cluster: Cluster, job: str, count: int) -> None:
    wait_for(lambda: cluster.job(job)["Restarts"] == str(count), seconds=60,
             what=lambda: f"restart {count}: {cluster.job(job)}")  # fmt: skip


def completed(cluster: Cluster, job: str, folder: Path) -> None:
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=150)
    assert state == "COMPLETED", said(folder)


def digests(run: Path) -> dict[str, dict[str, str]]:
    """Of every tensor at each save, by the checkpoint's name."""
    file = run / "digests.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {line["name"]: line["tensors"] for line in map(json.loads, lines)}


@together
def test_the_time_limit_saves_requeues_and_leaves_the_bits_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's own warning, at a limit of one minute; what is saved after it is what a run without a limit saved."""
    run, beside, slow = tmp_path / "run", tmp_path / "beside", ("--epochs", 400, "--checkpoint.every_steps", 20, *CPU)
    job = cluster.sbatch("--time=1", "--signal=B:USR1@10", *OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *slow,
                         "--run_dir", run, cwd=tmp_path)  # fmt: skip

    def stopped() -> list[int]:
        """At which steps; not the attempts that were warned while they still began, as they are on a busy machine."""
        return [one["step"] for one in attempts(run, "stopped") if one["step"]]

    def later() -> list[str]:
        both = digests(run).keys() & digests(beside).keys()
        return [name for name in both if int(name.split("-")[1]) > stopped()[0]]

    try:
        wait_for(lambda: bool(attempts(run, "started")), seconds=90, what=lambda: said(tmp_path))
        with Command(torchrun(1, LONG[0], *slow, "--threads", 1, "--run_dir", beside), output=tmp_path / "output"):
            wait_for(lambda: bool(stopped()), seconds=150, what=lambda: said(tmp_path))
            begun = len(attempts(run, "started"))
            started(cluster, run, count=begun + 1, saves=5)  # of five steps each, so a save of both runs is among them
            assert attempts(run, "started")[begun]["step"] == stopped()[0]
            assert "SIGUSR1: time limit or preemption" in attempts(run, "requeued")[-1]["reason"]
            wait_for(lambda: bool(later()), seconds=60, what=lambda: f"{digests(run).keys()}, {digests(beside).keys()}")
    finally:
        cluster.ask("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    assert all(digests(run)[name] == digests(beside)[name] for name in later())


@together
def test_what_will_repeat_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """A bad setting fails in seconds; so does a loss that becomes infinite."""
    debug = (ROOT / "slurm/train.sh", ROOT / "configs/debug.toml", *CPU)
    bad = cluster.sbatch(*OUT, *debug, "--optim.lrr", 1, cwd=tmp_path)
    alone = cluster.sbatch("--nodes=2", *OUT, *debug, "--run_dir", tmp_path / "alone", cwd=tmp_path,
                           RDZV_ADDRESS="127.0.1.1")  # fmt: skip
    infinite = cluster.sbatch(
        *OUT,
        *debug,
        "--optim.lr",
        100,
        "--optim.momentum",
        0.99,
        "--schedule.name",
        "constant",
        "--epochs",
        20,
        "--run_dir",
        tmp_path / "run",
        cwd=tmp_path,
    )
    for job, code in ((bad, 2), (alone, 2), (infinite, 3)):
        assert cluster.wait_for_state(job, "FAILED", "COMPLETED") == "FAILED", said(tmp_path)
        facts = cluster.job(job)
        assert (facts["Restarts"], facts["ExitCode"]) == ("0", f"{code}:0"), said(tmp_path)
    assert "did you mean optim.lr?" in (tmp_path / f"batch-{bad}.out").read_text()
    assert (
        "rendezvous address = 127.0.1.1: leads to 127.0.1.1, loopback" in (tmp_path / f"batch-{alone}.out").read_text()
    )
    assert "which would repeat" in cluster.job(infinite)["Comment"]


@together
def test_five_requeues_in_a_row_and_no_sixth(cluster: Cluster, tmp_path: Path) -> None:
    """Warned as soon as it begins, again and again: nothing is trained, and the job ends at its bound."""
    run = tmp_path / "run"
    job = cluster.sbatch(*OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:], "--run_dir", run, cwd=tmp_path,
                         MAX_REQUEUES="5")  # fmt: skip

    def has_begun(attempt: int) -> bool:
        """With a step: before, srun takes a warning and tells nobody."""
        return f"attempt {attempt} on" in said(tmp_path) and f"{job}.0" in cluster.ask("squeue", "--steps", "-h")

    for attempt in range(1, 7):
        wait_for(partial(has_begun, attempt), seconds=60, what=lambda: f"{cluster.job(job)}\n{said(tmp_path)}")
        cluster.ask("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait_for_state(job, "FAILED", "COMPLETED") == "FAILED", said(tmp_path)
    facts = cluster.job(job)
    assert (facts["Restarts"], facts["ExitCode"]) == ("5", "75:0"), said(tmp_path)
    assert "MAX_REQUEUES = 5 is reached" in facts["Comment"]
    assert len(attempts(run, "requeued")) == 5


@together
def test_preempted_twice_and_then_on_one_node_it_ends_with_the_same_bits(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.sbatch("--nodes=2", *OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:], "--run_dir", run,
                         cwd=tmp_path, PREFLIGHT="0")  # fmt: skip
    started(cluster, run, count=1)
    cluster.ask("scontrol", "requeue", job)
    started(cluster, run, count=2)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)  # what Slurm sends before the time limit
    restarted(cluster, job, 2)
    cluster.ask("scontrol", "update", f"jobid={job}", "NumNodes=1-1", "NumTasks=1")
    started(cluster, run, count=3)
    cluster.ask("scancel", "--signal=USR1", job)  # to the step alone: to torchrun, past the batch script
    completed(cluster, job, tmp_path)
    begun = attempts(run, "started")
    assert [one["world_size"] for one in begun] == [2, 2, 1, 1], said(tmp_path)
    assert [one["reason"] for one in attempts(run, "stopped")] == ["SIGTERM", "SIGUSR1", "SIGUSR1"], said(tmp_path)
    assert all(one["step"] % 15 for one in begun[1:] if one["step"] % 5), "resumed in mid-epoch"
    assert "requeue 2 of 20" in attempts(run, "requeued")[0]["reason"]
    assert "when Slurm ended the job" in attempts(run, "left to Slurm")[0]["reason"]
    assert "attempt 4: finished" in cluster.job(job)["Comment"]
    assert_same_bits(run, undisturbed)


@together
def test_two_nodes_an_array_on_one_node_and_any_folder(cluster: Cluster, tmp_path: Path) -> None:
    """The three scripts as shipped, from a folder that is not the project's."""
    data = ("--data.name", "generated10", *SMALL)
    for_100 = ("--data.name", "generated100", *SMALL, "--model.name", "improved_alexnet")
    (tmp_path / "setup").write_text("touch set-up\n")
    hooks = {"RANKS_PER_NODE": "2", "SETUP": str(tmp_path / "setup"), "CONTAINER": "env INSIDE=1"}
    array = cluster.sbatch("--array=0-2", "--nodelist=n1", ROOT / "slurm/cifar10.sh", *data, cwd=tmp_path)
    job = cluster.sbatch("--nodes=2", "--time=5", ROOT / "slurm/cifar100.sh", *for_100, cwd=tmp_path, PREFLIGHT="0")
    other = cluster.sbatch("--cpus-per-task=2", ROOT / "slurm/train.sh", ROOT / "configs/debug.toml", *SMALL,
                           cwd=tmp_path, **hooks)  # fmt: skip
    for each in (*(f"{array}_{task}" for task in range(3)), job, other):
        completed(cluster, each, tmp_path)
    tasks = [cluster.job(f"{array}_{task}")["JobId"] for task in range(3)]
    meetings = {place for task in tasks for place in re.findall(rf"job {task}: .* meeting at (\S+);", said(tmp_path))}
    assert len(meetings) == 3, "each job of an array needs a port of its own"
    assert "over 3 finished seeds: test accuracy" in (tmp_path / "runs/cifar10/summary.txt").read_text()
    run = tmp_path / "runs/S1-100"
    assert attempts(run, "started")[0]["world_size"] == 2
    address = re.findall(rf"job {job}: .* meeting at (\S+):\d+;", said(tmp_path))
    assert address[0] == cluster.hosts.address("n1")
    assert (run / f"slurm/{job}-n1.log").exists()
    assert (run / f"slurm/{job}-n2.log").exists()
    assert (tmp_path / "set-up").exists()
    assert "2 ranks x 1 thread" in (tmp_path / "runs/debug/logs/rank-0000.log").read_text()
    assert cluster.job(job)["Comment"] == "attempt 1: finished"


def test_a_lost_node_leaves_its_ranks_behind_and_the_job_goes_on_with_the_other(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    """slurmd of n2 is killed and its link cut: its rank lives on, Slurm requeues, one node goes on from the last save."""
    run = tmp_path / "run"
    wait_for(cluster.is_idle, seconds=60, what=lambda: cluster.ask("sinfo"))  # else it begins on the one that is free
    job = cluster.sbatch("--nodes=2", *OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:], "--run_dir", run,
                         cwd=tmp_path, PREFLIGHT="0")  # fmt: skip
    try:
        started(cluster, run, count=1)
        cluster.kill_node("n2")
        cluster.hosts.cut("n2")
        assert cluster.hosts.processes("n2"), "its ranks live on"
        restarted(cluster, job, 1)
        cluster.ask("scontrol", "update", f"jobid={job}", "NumNodes=1-1", "NumTasks=1")
        completed(cluster, job, tmp_path)
    finally:
        cluster.hosts.mend("n2")
        cluster.start_node("n2")
    wait_for(cluster.is_idle, seconds=60, what=lambda: cluster.ask("sinfo"))
    begun = attempts(run, "started")
    assert [one["world_size"] for one in begun] == [2, 1], said(tmp_path)
    assert begun[1]["step"] > 0
    told = [*attempts(run, "left to Slurm"), *attempts(run, "lost")]
    assert len(told) == 1, "attempts.jsonl says why the first attempt ended"
    assert_same_bits(run, undisturbed)


def test_the_script_of_a_lost_node_neither_writes_nor_requeues(cluster: Cluster, tmp_path: Path) -> None:
    """slurmd of the first node is killed: its batch script lives on while Slurm begins the job anew on the other node."""
    wait_for(cluster.is_idle, seconds=60, what=lambda: cluster.ask("sinfo"))
    run = tmp_path / "run"
    job = cluster.sbatch("--nodes=2", *OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:2], 400, *LONG[3:],
                         "--run_dir", run, cwd=tmp_path, PREFLIGHT="0")  # fmt: skip
    try:
        started(cluster, run, count=1)
        cluster.kill_node("n1")
        restarted(cluster, job, 1)
        cluster.ask("scontrol", "update", f"jobid={job}", "NumNodes=1-1", "NumTasks=1")
        wait_for(
            lambda: "another attempt of this job has begun" in said(tmp_path), seconds=60, what=lambda: said(tmp_path)
        )
        started(cluster, run, count=2)
        assert cluster.job(job)["Restarts"] == "1"
        assert attempts(run, "requeued") == []
        assert len(attempts(run, "lost")) == 1, "the next attempt says why this one ended"
        assert [one["host"] for one in attempts(run, "started")] == ["n1", "n2"]
    finally:
        cluster.ask("scancel", job)
        cluster.start_node("n1")
    wait_for(cluster.is_idle, seconds=60, what=lambda: cluster.ask("sinfo"))
