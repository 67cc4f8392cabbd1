"""launch.slurm on a real Slurm: what it refuses, prints and submits."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import cluster as slurm
from integration.cluster import Cluster
from integration.commands import ROOT

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
