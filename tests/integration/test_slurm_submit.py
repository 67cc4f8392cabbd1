"""launch.slurm on a real Slurm: what it refuses, prints and submits."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import cluster as slurm
from kit.cluster import Cluster
from kit.commands import ROOT

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(slurm.why_none()), reason=f"no Slurm here: {slurm.why_none()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def test_launch_slurm_checks_prints_and_submits(cluster: Cluster, tmp_path: Path) -> None:
    def ask(*words: object, fails: bool = False) -> str:
        command = (sys.executable, "-m", "launch.slurm", ROOT / "configs/debug.toml", "--run_dir", tmp_path / "run")
        return cluster.ask(*command, *words, fails=fails)

    held = ("--nodes", 2, "--sbatch=--hold", "--cpus-per-task", 2)
    printed = ask(*held, "--dry-run")
    assert shlex.split(printed)[:2] == ["sbatch", "--nodes=2"]
    assert not (tmp_path / "run").exists()
    told = ask(*held, "--seeds", 3, "--at-once", 1)
    job = told.split()[-1]
    try:
        facts = cluster.job(job)
        assert (facts["JobState"], facts["NumNodes"], facts["NumCPUs"]) == ("PENDING", "2-2", "4"), facts
        assert len((tmp_path / "run/sweep.txt").read_text().splitlines()) == 3
        beside = cluster.ask("bash", "slurm/cifar100.sh", fails=True)  # not the project of the job that waits
        assert beside == f"error: this is a batch script; submit it: sbatch {ROOT}/slurm/cifar100.sh ...\n"
    finally:
        cluster.ask("scancel", job)
    for words, said_so in (
        (("--nodes", 9), "exact.shards = 8 (auto) is less than the 9 processes"),
        (("--nodes", 64, "--exact.shards", 0), "fewer than the 64 processes"),
        (("--data.name", "cifar10", "--data.root", tmp_path / "none"), "none"),
        (("--device", "cuda"), "no GPUs are asked for"),
        (("--seeds", 2, "--sweep", "optim.lrr=1,2"), "did you mean optim.lr?"),
    ):
        text = ask(*words, fails=True)
        assert said_so in text
        assert "Traceback" not in text


def test_the_doctor_names_nodes_and_jobs_that_slurm_does_not_know(cluster: Cluster, tmp_path: Path) -> None:
    def examine(count: int) -> str:
        words = ("configs/debug.toml", "--run_dir", tmp_path / "run", "--seconds", 2)
        job = {"SLURM_JOB_ID": "99999", "SLURM_JOB_NUM_NODES": str(count), "SLURM_JOB_NODELIST": "n[1,9]"}
        return cluster.ask(sys.executable, "-m", "launch.doctor", *words, fails=True, **job)

    assert "SLURM_JOB_NUM_NODES = 3, and SLURM_JOB_NODELIST has n1, n9; run this inside the intended job" in examine(3)
    cluster.ask("scontrol", "update", "nodename=n1", "state=drain", "reason=bad disk")
    try:
        text = examine(2)
    finally:
        cluster.ask("scontrol", "update", "nodename=n1", "state=resume")
    assert "note: n1 is draining (IDLE+DRAIN (bad disk)): it keeps this job, and gets no new one" in text
    assert [line[:14] for line in text.splitlines() if line.startswith("no go: ")] == [
        "no go: n1: no ",
        "no go: n9: no ",
    ], text
    assert "Invalid job id" in text
    assert "Slurm has it as unknown; see sinfo -N -n n9" in text
    assert list((tmp_path / "run").iterdir()) == []


def failed(cluster: Cluster, job: str, output: Path) -> str:
    """What the batch script of a job said that ended with exit code 2."""
    cluster.wait_for_state(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0", output.read_text()
    return output.read_text()


def test_without_a_config_a_job_does_not_train_on_generated_images(cluster: Cluster, tmp_path: Path) -> None:
    here = tmp_path / "a folder"  # with a space, and the script by a relative path
    here.mkdir()
    script = os.path.relpath(ROOT / "slurm/train.sh", here)
    job = cluster.sbatch("--output", here / "out", script, "--device", "cpu", cwd=here)
    text = failed(cluster, job, here / "out")
    assert f"data.root = {here}/data: CIFAR-10 is not there, and Slurm job {job} names neither" in text
    assert "not started, see above" in text
    assert [path.name for path in here.iterdir()] == ["out"]


def test_a_job_whose_folder_is_gone_does_not_begin_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    here = tmp_path / "gone"
    here.mkdir()
    words = ("--hold", "--output", tmp_path / "out", ROOT / "slurm/train.sh", "debug", "--device", "cpu", "--run_dir")
    job = cluster.sbatch(*words, f"runs/{tmp_path.name}", cwd=here)
    here.rmdir()
    cluster.ask("scontrol", "release", job)
    text = failed(cluster, job, tmp_path / "out")
    assert f"run_dir = runs/{tmp_path.name}: relative to {here}, which is not there on this node" in text


def test_an_installed_package_trains_a_config_by_name(cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "site packages"
    for package in ("distributed", "launch"):  # links to the files that ship are followed, as by a build
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    words = ("--nodes", 1, "--cpus-per-task", 2, f"--sbatch=--output={tmp_path}/out", "--device", "cpu", "--epochs", 1)
    told = cluster.ask(sys.executable, "-m", "launch.slurm", "debug", *words, "--data.train_samples", 64,
                       "--data.test_samples", 20, cwd=tmp_path, PYTHONPATH=str(site))  # fmt: skip
    assert f"'{site}/distributed/share/slurm/train.sh'" in told
    job = told.split()[-1]
    cluster.wait_for_state(job, "COMPLETED")
    assert '"status": "finished"' in (tmp_path / "runs/debug/status.json").read_text()
