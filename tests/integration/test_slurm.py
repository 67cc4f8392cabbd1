"""The batch scripts on a real two-node Slurm: preemption, requeues and lost nodes do not change the bits."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
from kit.cluster import Cluster, slurm_unavailable, wait_for
from kit.commands import NARROW, ROOT, Command, alone, assert_same_bits, attempts, has_saved
from kit.slow_sink import SLOW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(slurm_unavailable()), reason=f"no Slurm here: {slurm_unavailable()}"),
]
CPU = ("--device", "cpu")
SMALL = ("--epochs", 1, "--data.train_samples", 300, "--data.test_samples", 60, "--global_batch_size", 32, *CPU)
SETTINGS = ("--checkpoint.every_steps", 5, "--checkpoint.keep_last", 2, "--logging.every_steps", 2, *NARROW, *CPU)
LONG = ("configs/debug.toml", "--epochs", 8, *SETTINGS)
ENDLESS = ("configs/debug.toml", "--epochs", 1000, *SETTINGS)
KIT = {"PYTHONPATH": str(ROOT / "tests")}
"""The variable that lets a job import the slow sink."""
OUT = ("--output", "batch-%j.out")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(alone(*LONG, "--threads", 1, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return run


CONCURRENT: dict[str, Callable[..., None]] = {}


def concurrent(scenario: Callable[..., None]) -> Callable[[dict[str, Future[None]]], None]:
    """Mark a test that leaves the nodes as they are and mostly waits; such tests run at the same time, in threads."""
    CONCURRENT[scenario.__name__] = scenario

    def test(futures: dict[str, Future[None]]) -> None:
        futures[scenario.__name__].result()

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@pytest.fixture(scope="module")
def futures(
    cluster: Cluster, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[None]]]:
    """Start the selected concurrent tests, and yield their futures by name."""
    selected = {item.name for item in request.session.items}
    with ThreadPoolExecutor(3) as pool:
        started = {}
        for name, scenario in CONCURRENT.items():
            values = {"cluster": cluster, "undisturbed": undisturbed, "tmp_path": tmp_path_factory.mktemp("concurrent")}
            if name in selected:
                arguments = {key: values[key] for key in signature(scenario).parameters}
                started[name] = pool.submit(scenario, **arguments)
        yield started


def output_of(folder: Path) -> str:
    """Return the end of all output of a folder's jobs, for a test that fails."""
    files = [*folder.glob("*.out"), *folder.rglob("slurm/*.log")]
    return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in sorted(files))


def wait_for_attempt(run: Path, *, count: int) -> None:
    """Wait until `count` attempts have started and the last one has saved."""
    wait_for(partial(has_saved, run, attempt=count), seconds=90,
             description=lambda: f"attempt {count}\n{output_of(run.parent)}")  # fmt: skip


def wait_for_restart(cluster: Cluster, job: str, count: int) -> None:
    wait_for(lambda: cluster.job(job)["Restarts"] == str(count), seconds=60,
             description=lambda: f"restart {count}: {cluster.job(job)}")  # fmt: skip


def wait_for_idle_nodes(cluster: Cluster) -> None:
    wait_for(cluster.is_idle, seconds=60, description=lambda: cluster.run("sinfo"))


def wait_for_completion(cluster: Cluster, job: str, folder: Path) -> None:
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=150)
    assert state == "COMPLETED", output_of(folder)


def use_one_node(cluster: Cluster, job: str) -> None:
    """Let a requeued job start on a single node."""
    cluster.run("scontrol", "update", f"jobid={job}", "NumNodes=1-1", "NumTasks=1")


def digests(run: Path) -> dict[str, dict[str, str]]:
    """Return the digest of every tensor at each save, by the checkpoint's name."""
    file = run / "digests.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {line["name"]: line["tensors"] for line in map(json.loads, lines)}


@concurrent
def test_the_time_limit_requeues_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's own warning, at a limit of one minute; later saves equal those of a run without a limit."""
    run, unlimited = tmp_path / "run", tmp_path / "other"
    job = cluster.sbatch("--time=1", "--signal=B:USR1@10", *OUT, ROOT / "slurm/train.sh", ROOT / ENDLESS[0], *ENDLESS[1:],
                         *SLOW, "--run_dir", run, cwd=tmp_path, **KIT)  # fmt: skip

    def stopped() -> list[int]:
        """Return the steps of the stops, without attempts that a busy machine had warned before their first step."""
        return [line["step"] for line in attempts(run, "stopped") if line["step"]]

    def later_saves() -> list[str]:
        both = digests(run).keys() & digests(unlimited).keys()
        return [name for name in both if int(name.split("-")[1]) > stopped()[0]]

    output = partial(output_of, tmp_path)
    try:
        wait_for(lambda: bool(attempts(run, "started")), seconds=90, description=output)
        with Command(alone(*ENDLESS, "--threads", 1, *SLOW, "--run_dir", unlimited), output=tmp_path / "output"):
            wait_for(lambda: bool(stopped()), seconds=150, description=output)
            known = len(attempts(run, "started"))
            # A slow machine may take several attempts of a minute to reach the next save.
            wait_for(lambda: bool(later_saves()), seconds=180,
                     description=lambda: f"{digests(run).keys()}, {digests(unlimited).keys()}\n{output()}")  # fmt: skip
            assert attempts(run, "started")[known]["step"] == stopped()[0]
            requeued = attempts(run, "requeued")
            assert all("SIGUSR1: time limit or preemption" in line["reason"] for line in requeued)
            assert requeued
    finally:
        cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    assert all(digests(run)[name] == digests(unlimited)[name] for name in later_saves())


@concurrent
def test_a_failure_that_would_repeat_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """A bad setting, a loopback rendezvous, and a loss that becomes infinite."""
    debug = (ROOT / "slurm/train.sh", ROOT / "configs/debug.toml", *CPU)
    diverging = ("--optim.lr", 100, "--optim.momentum", 0.99, "--schedule.name", "constant", "--epochs", 20)
    bad = cluster.sbatch(*OUT, *debug, "--optim.lrr", 1, cwd=tmp_path)
    loopback = cluster.sbatch("--nodes=2", *OUT, *debug, "--run_dir", tmp_path / "loopback", cwd=tmp_path,
                              RDZV_ADDRESS="127.0.1.1")  # fmt: skip
    infinite = cluster.sbatch(*OUT, *debug, *diverging, "--run_dir", tmp_path / "run", cwd=tmp_path)
    for job, code in ((bad, 2), (loopback, 2), (infinite, 3)):
        assert cluster.wait_for_state(job, "FAILED", "COMPLETED") == "FAILED", output_of(tmp_path)
        fields = cluster.job(job)
        assert (fields["Restarts"], fields["ExitCode"]) == ("0", f"{code}:0"), output_of(tmp_path)
    assert "did you mean optim.lr?" in (tmp_path / f"batch-{bad}.out").read_text()
    message = "rendezvous address = 127.0.1.1: resolves to 127.0.1.1, a loopback address"
    assert message in (tmp_path / f"batch-{loopback}.out").read_text()
    assert "which would repeat" in cluster.job(infinite)["Comment"]


@concurrent
def test_one_task_of_an_array_is_requeued_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The task whose job id is that of the array."""
    run = tmp_path / "run"
    array = cluster.sbatch("--array=0-1", *OUT, ROOT / "slurm/train.sh", ROOT / ENDLESS[0], *ENDLESS[1:], *SLOW,
                           "--run_dir", run, cwd=tmp_path, **KIT)  # fmt: skip
    try:
        for task in range(2):
            wait_for(partial(has_saved, run / f"seed-{task}", attempt=1), seconds=90,
                     description=partial(output_of, tmp_path))  # fmt: skip
        own, other = sorted(
            (f"{array}_{task}" for task in range(2)), key=lambda task: cluster.job(task)["JobId"] != array
        )
        assert cluster.job(own)["JobId"] == array
        cluster.run("scancel", "--signal=USR1", "--batch", own)
        wait_for_restart(cluster, own, 1)
        assert (cluster.job(other)["JobState"], cluster.job(other)["Restarts"]) == ("RUNNING", "0")
    finally:
        cluster.run("scancel", array)


@concurrent
def test_two_requeues_in_a_row_and_no_third(cluster: Cluster, tmp_path: Path) -> None:
    """A job that is warned at each start trains nothing, and ends at its limit of requeues."""
    run = tmp_path / "run"
    job = cluster.sbatch(*OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:], "--run_dir", run, cwd=tmp_path,
                         MAX_REQUEUES="2")  # fmt: skip

    def has_begun(attempt: int) -> bool:
        """Whether the attempt has a job step; before that, srun swallows a warning."""
        return f"attempt {attempt} on" in output_of(tmp_path) and f"{job}.0" in cluster.run("squeue", "--steps", "-h")

    for attempt in range(1, 4):
        wait_for(partial(has_begun, attempt), seconds=60,
                 description=lambda: f"{cluster.job(job)}\n{output_of(tmp_path)}")  # fmt: skip
        cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert cluster.wait_for_state(job, "FAILED", "COMPLETED") == "FAILED", output_of(tmp_path)
    fields = cluster.job(job)
    assert (fields["Restarts"], fields["ExitCode"]) == ("2", "75:0"), output_of(tmp_path)
    assert "MAX_REQUEUES = 2 is reached" in fields["Comment"]
    assert len(attempts(run, "requeued")) == 2


@concurrent
def test_preemption_and_fewer_nodes_keep_the_bits(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """Preempted twice on two nodes, then stopped and resumed on one."""
    run = tmp_path / "run"
    job = cluster.sbatch("--nodes=2", *OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:], *SLOW, "--run_dir", run,
                         cwd=tmp_path, PREFLIGHT="0", **KIT)  # fmt: skip
    wait_for_attempt(run, count=1)
    cluster.run("scontrol", "requeue", job)
    wait_for_attempt(run, count=2)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # what Slurm sends before the time limit
    wait_for_restart(cluster, job, 2)
    use_one_node(cluster, job)
    wait_for_attempt(run, count=3)
    cluster.run("scancel", "--signal=USR1", job)  # to the step alone: to torchrun, past the batch script
    wait_for_completion(cluster, job, tmp_path)
    started = attempts(run, "started")
    assert [line["world_size"] for line in started] == [2, 2, 1, 1], output_of(tmp_path)
    assert [line["reason"] for line in attempts(run, "stopped")] == ["SIGTERM", "SIGUSR1", "SIGUSR1"], output_of(
        tmp_path
    )
    assert any(line["step"] % 15 for line in started[1:]), "no attempt resumed in mid-epoch"
    assert "requeue 1 of 20" in attempts(run, "requeued")[0]["reason"]
    assert "when Slurm ended the job" in attempts(run, "left to Slurm")[0]["reason"]
    assert "attempt 4: finished" in cluster.job(job)["Comment"]
    assert_same_bits(run, undisturbed)


@concurrent
def test_the_shipped_scripts_work_from_any_folder(cluster: Cluster, tmp_path: Path) -> None:
    """An array on one node, a job on two, and the hooks, all submitted outside the project."""
    cifar10 = ("--data.name", "generated10", *SMALL)
    cifar100 = ("--data.name", "generated100", *SMALL, "--model.name", "improved_alexnet")
    (tmp_path / "setup").write_text("touch set-up\n[ -n $UNSET ]\nexport NAMED_BY=setup\n")
    (tmp_path / "record").write_text('echo "$NAMED_BY" >>record.txt\nexec "$@"\n')
    hooks = {"RANKS_PER_NODE": "2", "SETUP": str(tmp_path / "setup"), "CONTAINER": f"sh {tmp_path / 'record'}"}
    array = cluster.sbatch("--array=0-1", "--nodelist=n1", ROOT / "slurm/cifar10.sh", *cifar10, cwd=tmp_path)
    job = cluster.sbatch("--nodes=2", "--time=5", ROOT / "slurm/cifar100.sh", *cifar100, cwd=tmp_path, PREFLIGHT="0")
    hooked = cluster.sbatch("--cpus-per-task=2", "--export=ALL,NAMED_BY=sbatch", ROOT / "slurm/train.sh",
                            ROOT / "configs/debug.toml", *SMALL, cwd=tmp_path, **hooks)  # fmt: skip
    for each in (*(f"{array}_{task}" for task in range(2)), job, hooked):
        wait_for_completion(cluster, each, tmp_path)
    tasks = [cluster.job(f"{array}_{task}")["JobId"] for task in range(2)]
    text = output_of(tmp_path)
    places = {place for task in tasks for place in re.findall(rf"job {task}: .* rendezvous at (\S+);", text)}
    assert len(places) == 2, "each job of an array needs a port of its own"
    assert "over 2 finished seeds: test accuracy" in (tmp_path / "runs/cifar10/summary.txt").read_text()
    run = tmp_path / "runs/S1-100"
    assert attempts(run, "started")[0]["world_size"] == 2
    address = re.findall(rf"job {job}: .* rendezvous at (\S+):\d+;", text)
    assert address[0] == cluster.hosts.address("n1")
    assert (run / f"slurm/{job}-n1.log").exists()
    assert (run / f"slurm/{job}-n2.log").exists()
    assert (tmp_path / "set-up").exists()
    assert set((tmp_path / "record.txt").read_text().split()) == {"setup"}, "also in the steps"
    assert "2 ranks x 1 thread" in (tmp_path / "runs/debug/logs/rank-0000.log").read_text()
    assert cluster.job(job)["Comment"] == "attempt 1: finished"


def test_after_a_node_is_lost_the_job_resumes_on_the_other(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """slurmd of n2 is killed and its link cut: its rank lives on, Slurm requeues, and one node resumes from the last save."""
    run = tmp_path / "run"
    wait_for_idle_nodes(cluster)  # else the job begins on the one that is free
    job = cluster.sbatch("--nodes=2", *OUT, ROOT / "slurm/train.sh", ROOT / LONG[0], *LONG[1:], *SLOW, "--run_dir", run,
                         cwd=tmp_path, PREFLIGHT="0", **KIT)  # fmt: skip
    try:
        wait_for_attempt(run, count=1)
        cluster.kill_node("n2")
        cluster.hosts.cut("n2")
        assert cluster.hosts.processes("n2"), "its ranks live on"
        wait_for_restart(cluster, job, 1)
        use_one_node(cluster, job)
        wait_for_completion(cluster, job, tmp_path)
    finally:
        cluster.hosts.restore("n2")
        cluster.start_node("n2")
    wait_for_idle_nodes(cluster)
    started = attempts(run, "started")
    assert [line["world_size"] for line in started] == [2, 1], output_of(tmp_path)
    assert started[1]["step"] > 0
    reasons = [*attempts(run, "left to Slurm"), *attempts(run, "lost")]
    assert len(reasons) == 1, "attempts.jsonl says why the first attempt ended"
    assert_same_bits(run, undisturbed)


def test_the_script_of_a_lost_node_does_nothing_more(cluster: Cluster, tmp_path: Path) -> None:
    """slurmd of the first node is killed: its batch script lives on while Slurm restarts the job on the other node."""
    wait_for_idle_nodes(cluster)
    run = tmp_path / "run"
    job = cluster.sbatch("--nodes=2", *OUT, ROOT / "slurm/train.sh", ROOT / ENDLESS[0], *ENDLESS[1:], *SLOW,
                         "--run_dir", run, cwd=tmp_path, PREFLIGHT="0", **KIT)  # fmt: skip
    try:
        wait_for_attempt(run, count=1)
        cluster.kill_node("n1")
        wait_for_restart(cluster, job, 1)
        use_one_node(cluster, job)
        wait_for(lambda: "another attempt of this job has started" in output_of(tmp_path), seconds=60,
                 description=lambda: output_of(tmp_path))  # fmt: skip
        wait_for_attempt(run, count=2)
        assert cluster.job(job)["Restarts"] == "1"
        assert attempts(run, "requeued") == []
        assert len(attempts(run, "lost")) == 1, "the next attempt says why this one ended"
        assert [line["host"] for line in attempts(run, "started")] == ["n1", "n2"]
    finally:
        cluster.run("scancel", job)
        cluster.start_node("n1")
    wait_for_idle_nodes(cluster)
