"""launch.doctor on this machine and on a real two-node Slurm: go if all is well, else no go with the bad node's name."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from kit.cluster import Cluster, slurm_unavailable
from kit.commands import ROOT

SETTINGS = ("configs/debug.toml", "--run_dir")
needs_slurm = pytest.mark.skipif(bool(slurm_unavailable()), reason=f"no Slurm here: {slurm_unavailable()}")


def test_on_one_machine_it_prints_go_or_the_fault(tmp_path: Path) -> None:
    def examine(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "launch.doctor", *SETTINGS, tmp_path / "run", *arguments]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, text = examine()
    assert (code, "go: 1 node" in text) == (0, True), text
    assert list((tmp_path / "run").iterdir()) == [], "the token is removed"
    code, text = examine("--data.name", "cifar10", "--data.root", tmp_path / "nothing", "--free-gib", 1e9)
    assert code == 1, text
    assert "no go: " in text
    assert str(tmp_path / "nothing") in text
    assert "GiB free, less than" in text
    code, text = examine("--optim.lrr", 1)
    assert (code, "did you mean optim.lr?" in text) == (2, True), text


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def preflight(cluster: Cluster, run: Path) -> tuple[bool, str]:
    """Submit a job on two nodes; return whether its preflight let it train, and its output."""
    job = cluster.sbatch("--nodes=2", "--output", run.parent / "batch.out", ROOT / "slurm/train.sh", ROOT / SETTINGS[0],
                         "--device", "cpu", "--epochs", 1, "--run_dir", run)  # fmt: skip
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    text = (run / f"slurm/{job}.log").read_text() + (run.parent / "batch.out").read_text()
    if state == "FAILED":
        fields = cluster.job(job)
        assert (fields["Restarts"], fields["ExitCode"]) == ("0", "2:0"), text
        assert "preflight: no go: n2" in fields["Comment"], fields["Comment"]
    return state == "COMPLETED", text


@pytest.mark.slow
@pytest.mark.timeout(240)
@needs_slurm
def test_two_good_nodes_train_and_a_bad_one_is_named(cluster: Cluster, tmp_path: Path) -> None:
    good, text = preflight(cluster, tmp_path / "run")
    assert good, text
    assert "go: 2 nodes" in text
    assert text.count("GiB/s") == 2, text

    on_n2 = ["nsenter", "-t", str(cluster.node_pid("n2")), "-m"]
    hidden = tmp_path / "not-shared"
    (hidden / "run").mkdir(parents=True)
    subprocess.run([*on_n2, "mount", "-t", "tmpfs", "none", str(hidden / "run")], check=True)
    good, text = preflight(cluster, hidden / "run")
    assert not good
    assert f"no go: n2: run_dir = {hidden / 'run'} is not shared" in text
    assert text.count("no go: ") == 1, text

    old = tmp_path / "METADATA"
    installed = next(Path(file.locate()) for file in metadata.files("safetensors") or () if file.name == "METADATA")
    shutil.copy(installed, old)
    old.write_text("".join(
        "Version: 0.0.1\n" if line.startswith("Version: ") else line for line in old.read_text().splitlines(keepends=True)
    ))  # fmt: skip
    subprocess.run([*on_n2, "mount", "--bind", str(old), str(installed)], check=True)
    good, text = preflight(cluster, tmp_path / "another")
    assert not good
    assert "no go: n2: safetensors 0.0.1, but the others have" in text
    assert text.count("no go: ") == 1, text


@pytest.mark.slow
@pytest.mark.timeout(240)
@needs_slurm
def test_a_node_whose_slurmd_is_dead_is_named(cluster: Cluster, tmp_path: Path) -> None:
    wait = f"until [ -e {tmp_path}/go ]; do sleep 0.1; done"
    doctor = f"{sys.executable} -m launch.doctor configs/debug.toml --run_dir {tmp_path}/run --seconds 5"
    options = ("--nodes=2", "--no-requeue", "--no-kill", "--output", tmp_path / "out")
    job = cluster.sbatch(*options, "--wrap", f"{wait}; {doctor}")
    cluster.wait_for_state(job, "RUNNING")
    cluster.kill_node("n2")
    try:
        (tmp_path / "go").touch()
        cluster.wait_for_state(job, "FAILED", seconds=150)
    finally:
        cluster.start_node("n2")
    text = (tmp_path / "out").read_text()
    assert text.count("no go: ") == 1, text
    assert "no go: n2: no answer: " in text
    assert "--exclude=n2" in text
    assert "Traceback" not in text
    assert "\nn1 " in text, "the other node's report is shown"
