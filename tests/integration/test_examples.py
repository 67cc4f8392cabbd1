"""The commands of examples/README.md as printed, with the package installed by pip, in a folder outside the checkout."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.cluster import Cluster, slurm_unavailable
from kit.commands import ROOT, Command, assert_same_bits, attempts, has_saved, kill, status, torchrun
from kit.ray_nodes import RayCluster

from distributed.config import from_command_line

pytest.importorskip("setuptools", minversion="77")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
README = (ROOT / "examples/README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def printed(part: str) -> str:
    """Return the only block of commands that has this part."""
    [block] = [block for block in BLOCKS if part in block]
    return block


class Project:
    """A copy of examples/own-network, and a venv with the installed package. The other packages are those of this Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "own network"
        shutil.copytree(ROOT / "examples/own-network", self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.venv = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.venv], check=True)
        packages = next(self.venv.glob("lib/python*/site-packages"))
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        source = folder / "source"  # building writes into its source folder
        for name in ("configs", "distributed", "launch", "slurm"):
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        assert printed("pip install") == "pip install .\n"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.venv / "bin/python", "install",
               "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "."]  # fmt: skip
        done = subprocess.run(pip, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for name in ("torchrun", "ray"):  # pip would have installed them here too
            _, _, script = Path(sys.executable).with_name(name).read_text().partition("\n")
            (self.venv / "bin" / name).write_text(f"#!{self.venv}/bin/python\n{script}")
            (self.venv / "bin" / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.venv}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {"PATH": path, "PYTHONPATH": "", "VENV": "", "OMP_NUM_THREADS": "1"}

    def start(self, commands: str, **environment: str) -> Command:
        """Start printed commands in the project's folder."""
        output = self.folder.parent / f"output-{len(list(self.folder.parent.glob('output-*')))}"
        command = ["bash", "-e", "-c", commands]
        return Command(command, output=output, cwd=self.folder, more=self.environment | environment)

    def run(self, commands: str, **environment: str) -> str:
        """Run printed commands in the project's folder, and return their output."""
        with self.start(commands, **environment) as command:
            assert command.wait(150) == 0, command.text
            return command.text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("project"))
    where = made.run("python -c 'import distributed; print(distributed.__file__)'")
    assert where.startswith(str(made.venv)), "the installed package is used, not the checkout"
    return made


@pytest.fixture(scope="module")
def trained(project: Project) -> Path:
    """The run on two processes, killed and resumed on three."""
    run = project.folder / "runs/shapes"
    with project.start(printed("--nproc_per_node=2")) as command:
        command.wait_for(lambda: has_saved(run) and status(run)["saved_step"] >= 20, what="a save")
        kill(*command.ranks(), command.process.pid)
    project.run(printed("--nproc_per_node=3"))
    return run


def test_the_killed_run_equals_an_undisturbed_one(project: Project, trained: Path) -> None:
    assert [attempt["world_size"] for attempt in attempts(trained, "started")] == [2, 3]
    assert attempts(trained, "started")[1]["step"] >= 20
    text = project.run(printed("distributed.compare"))
    assert "bit-identical" in text
    assert_same_bits(trained, project.folder / "runs/undisturbed")
    assert float(re.findall(r"([\d.]+)%", text)[-1]) > 50, "a small network can distinguish four shapes"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.mark.skipif(bool(slurm_unavailable()), reason=f"no Slurm here: {slurm_unavailable()}")
def test_slurm_trains_the_same(project: Project, trained: Path, cluster: Cluster) -> None:
    def submit(commands: str) -> str:
        return cluster.run("bash", "-e", "-c", commands, cwd=project.folder, **project.environment)

    job = submit(printed("--nodes 2")).split()[-1]
    sweep = submit(printed("--trials 3"))
    output = project.folder / f"slurm-{job}.out"
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=150) == "COMPLETED", output.read_text()
    run = project.folder / "runs/slurm"
    assert attempts(run, "started")[0]["world_size"] == 2
    assert_same_bits(run, trained)
    for task in range(3):
        cluster.wait_for_state(f"{sweep.split()[-1]}_{task}", "COMPLETED", "FAILED", seconds=150)
    table = (project.folder / "runs/sweep/summary.txt").read_text()
    assert len(re.findall(r"^optim\.lr=\S+,model\.options\.width=\S+ +finished", table, re.MULTILINE)) == 3, table


def test_ray_trains_the_same(project: Project, trained: Path) -> None:
    with RayCluster(ray=project.venv / "bin/ray", **project.environment) as ray:
        ray.add("n1", cpus=2)
        text = project.run(printed("ray job submit"), **ray.environment)
    assert "succeeded" in text, text
    run = project.folder / "runs/ray"
    assert attempts(run, "started")[0]["world_size"] == 2
    assert_same_bits(run, trained)


def test_resnet18_trains_on_cifar100_by_config_alone(tmp_path: Path) -> None:
    """A step on the real data set, if it is here; else an epoch of generated images of a hundred classes.

    Small batches: torchrun kills a rank that has not ended its step 30 s after a signal.
    """
    words = printed("resnet18-cifar100.toml").split()
    assert words[:4] == ["torchrun", "--nproc_per_node=1", "-m", "distributed.train"]
    config = from_command_line([str(ROOT / words[4]), *words[5:]]).config
    assert (config.model.name, config.data.name) == ("torchvision.models:resnet18", "cifar100")
    run, real = tmp_path / "run", os.environ.get("CIFAR_ROOT")
    generated = ("--data.name", "generated100", "--data.train_samples", 200, "--data.test_samples", 100, "--epochs", 1)
    data = ("--data.root", real) if real else generated
    cpu = ("--device", "cpu", "--global_batch_size", 32, "--logging.every_steps", 1)
    with Command(torchrun(1, ROOT / words[4], *data, *cpu, "--run_dir", run), output=tmp_path / "output") as command:
        if real:
            command.wait_for(lambda: "step 1/" in command.text, what="step 1")
            kill(command.process.pid, number=signal.SIGTERM)
        command.wait(150)
        assert status(run)["status"] == ("stopped" if real else "finished"), command.text
