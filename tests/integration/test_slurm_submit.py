"""launch.slurm on a real Slurm: what it refuses, prints and submits."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.cluster import Cluster, slurm_unavailable, wait_for
from kit.commands import ROOT, status

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(slurm_unavailable()), reason=f"no Slurm here: {slurm_unavailable()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def test_launch_slurm_checks_prints_and_submits(cluster: Cluster, tmp_path: Path) -> None:
    def run(*arguments: object, fails: bool = False) -> str:
        command = (sys.executable, "-m", "launch.slurm", ROOT / "configs/debug.toml", "--run_dir", tmp_path / "run")
        return cluster.run(*command, *arguments, fails=fails)

    on_hold = ("--nodes", 2, "--sbatch=--hold", "--cpus-per-task", 2)
    printed = run(*on_hold, "--sbatch=--export=ALL,SETUP=/my/setup", "--dry-run")
    assert shlex.split(printed)[:2] == ["sbatch", "--nodes=2"]
    [export] = [word for word in shlex.split(printed) if word.startswith("--export=")]
    assert export.startswith("--export=ALL,")
    assert "MAX_REQUEUES" not in export, "the variable of that name counts"
    assert export.endswith(",SETUP=/my/setup")
    assert not (tmp_path / "run").exists()
    job = run(*on_hold, "--seeds", 3, "--at-once", 1).split()[-1]
    try:
        fields = cluster.job(job)
        assert (fields["JobState"], fields["NumNodes"], fields["NumCPUs"]) == ("PENDING", "2-2", "4"), fields
        assert cluster.run("squeue", "-h", "-j", job, "-o", "%K").strip() == "0-2%1"
        outside = cluster.run("bash", "slurm/cifar100.sh", fails=True)  # another project than the pending job's
        assert outside == f"error: this is a batch script; submit it: sbatch {ROOT}/slurm/cifar100.sh ...\n"
    finally:
        cluster.run("scancel", job)
    for arguments, message in (
        (("--nodes", 9), "exact.shards = 8 (auto) is less than the 9 processes"),
        (("--nodes", 64, "--exact.shards", 0), "fewer than the 64 processes"),
        (("--data.name", "cifar10", "--data.root", tmp_path / "none"), "none"),
        (("--device", "cuda"), "no GPUs are requested"),
        (("--seeds", 2, "--sweep", "optim.lrr=1,2"), "did you mean optim.lr?"),
    ):
        text = run(*arguments, fails=True)
        assert message in text
        assert "Traceback" not in text


def test_a_killed_random_sweep_resumes_with_its_trials(cluster: Cluster, tmp_path: Path) -> None:
    """One trial finishes, the array is cancelled; the same command submits the other trials alone."""
    (tmp_path / "sweep.toml").write_text(
        'extends = "debug"\ndevice = "cpu"\nepochs = 1\ndata.train_samples = 200\ndata.test_samples = 40\n'
        '[sweep]\ntrials = 3\noptim.lr = "log_uniform(1e-4, 1e-1)"\n'
    )

    def submit(*options: object) -> str:
        command = (sys.executable, "-m", "launch.slurm", "sweep.toml", "--run_dir", "sweep", "--sbatch=--output=out-%a")
        return cluster.run(*command, *options, cwd=tmp_path, PYTHONPATH=str(ROOT))

    printed = submit("--at-once", 1)
    trials = [line.split("--run_dir ")[1] for line in printed.splitlines() if line.startswith("task ")]
    assert len(set(trials)) == 3
    assert "--array=0-2%1" in printed
    job = printed.split()[-1]
    wait_for(lambda: (tmp_path / trials[0] / "status.json").exists() and status(tmp_path / trials[0])["status"] == "finished",
             seconds=60, description="the first trial")  # fmt: skip
    cluster.run("scancel", job)
    cluster.wait_for_state(f"{job}_2", "CANCELLED")
    wait_for(cluster.is_idle, seconds=60, description="the end of the second trial")
    again = submit()
    assert [line.split("--run_dir ")[1] for line in again.splitlines() if line.startswith("task ")] == trials[1:]
    assert "--array=1-2 " in again
    for task in (1, 2):
        cluster.wait_for_state(f"{again.split()[-1]}_{task}", "COMPLETED", "FAILED")
    assert [status(tmp_path / trial)["status"] for trial in trials] == ["finished"] * 3, output_of(tmp_path)
    table = (tmp_path / "sweep/summary.txt").read_text().splitlines()
    accuracies = [float(line.split("%")[0].split()[-1]) for line in table[1:4]]
    assert accuracies == sorted(accuracies, reverse=True), table
    best = table[1].split()[0]
    assert f"best: {best}, " in table[-1]
    assert f"\nlr = {best.removeprefix('optim.lr=')}\n" in (tmp_path / "sweep/best.toml").read_text()
    assert "Traceback" not in output_of(tmp_path)
    assert submit() == "", "all are finished"


def output_of(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("out-*")))


def test_the_doctor_names_unknown_nodes_and_jobs(cluster: Cluster, tmp_path: Path) -> None:
    def examine(count: int) -> str:
        arguments = ("configs/debug.toml", "--run_dir", tmp_path / "run", "--seconds", 2)
        job = {"SLURM_JOB_ID": "99999", "SLURM_JOB_NUM_NODES": str(count), "SLURM_JOB_NODELIST": "n[1,9]"}
        return cluster.run(sys.executable, "-m", "launch.doctor", *arguments, fails=True, **job)

    assert "SLURM_JOB_NUM_NODES = 3, but SLURM_JOB_NODELIST has n1, n9; run this inside the intended job" in examine(3)
    cluster.run("scontrol", "update", "nodename=n1", "state=drain", "reason=bad disk")
    try:
        text = examine(2)
    finally:
        cluster.run("scontrol", "update", "nodename=n1", "state=resume")
    assert "note: n1 is draining (IDLE+DRAIN (bad disk)): it keeps this job and gets no new one" in text
    assert [line[:14] for line in text.splitlines() if line.startswith("no go: ")] == [
        "no go: n1: no ",
        "no go: n9: no ",
    ], text
    assert "Invalid job id" in text
    assert "its state in Slurm is unknown; see sinfo -N -n n9" in text
    assert list((tmp_path / "run").iterdir()) == []


def refused(cluster: Cluster, job: str, output: Path) -> str:
    """Return the output of a batch script that should end with exit code 2."""
    cluster.wait_for_state(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0", output.read_text()
    return output.read_text()


def test_a_job_without_config_or_data_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"  # with a space, and the script by a relative path
    folder.mkdir()
    script = os.path.relpath(ROOT / "slurm/train.sh", folder)
    job = cluster.sbatch("--output", folder / "out", script, "--device", "cpu", cwd=folder)
    text = refused(cluster, job, folder / "out")
    assert f"data.root = {folder}/data: CIFAR-10 is not there, and Slurm job {job} names neither" in text
    assert "not started, see above" in text
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_job_whose_folder_is_gone_does_not_start_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    options = ("--hold", "--output", tmp_path / "out")
    arguments = ("debug", "--device", "cpu", "--run_dir", f"runs/{tmp_path.name}")
    job = cluster.sbatch(*options, ROOT / "slurm/train.sh", *arguments, cwd=folder)
    folder.rmdir()
    cluster.run("scontrol", "release", job)
    text = refused(cluster, job, tmp_path / "out")
    assert f"run_dir = runs/{tmp_path.name}: relative to {folder}, which this node does not have" in text


def test_an_installed_package_trains_a_config_by_name(cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site packages"
    for package in ("distributed", "launch"):  # follows the links to shipped files, like a build
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    options = (
        "--nodes",
        1,
        "--cpus-per-task",
        2,
        f"--sbatch=--output={tmp_path}/out",
        "--device",
        "cpu",
        "--epochs",
        1,
    )
    printed = cluster.run(sys.executable, "-m", "launch.slurm", "debug", *options, "--data.train_samples", 64,
                          "--data.test_samples", 20, cwd=tmp_path, PYTHONPATH=str(site))  # fmt: skip
    assert f"'{site}/distributed/share/slurm/train.sh'" in printed
    job = printed.split()[-1]
    cluster.wait_for_state(job, "COMPLETED")
    assert '"status": "finished"' in (tmp_path / "runs/debug/status.json").read_text()
