"""The installed wheel, used outside a checkout: configs by name, console scripts, batch scripts."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from kit.commands import ROOT

from distributed.config.named import names

pytest.importorskip("setuptools", minversion="77")
SHIPPED = sorted(
    str(file.relative_to(ROOT))
    for file in (*ROOT.glob("configs/**/*.toml"), *ROOT.glob("slurm/*.sh"), ROOT / "launch/ray_job.yaml")
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a build reads, since building writes into its source folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("configs", "distributed", "launch", "slurm"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the installed wheel."""
    target = tmp_path_factory.mktemp("site packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index",
           "--no-build-isolation", "--target", str(target), str(source)]  # fmt: skip
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(site: Path, cwd: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the installed package, outside a checkout."""
    return subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "VENV"} | {"PYTHONPATH": str(site)} | environment,
    )  # fmt: skip


def test_the_wheel_contains_every_shipped_file(site: Path) -> None:
    share = site / "distributed/share"
    assert sorted(str(file.relative_to(share)) for file in share.rglob("*") if file.is_file()) == SHIPPED
    assert [name for name in SHIPPED if (share / name).read_bytes() != (ROOT / name).read_bytes()] == []
    assert not any(path.is_symlink() for path in share.rglob("*"))
    assert os.access(share / "slurm/train.sh", os.X_OK)
    folders = {path.parent.relative_to(ROOT) for package in ("distributed", "launch")
               for path in (ROOT / package).rglob("*.py")}  # fmt: skip
    assert [folder for folder in folders if not (site / folder).is_dir()] == []


def test_configs_are_found_by_name_from_any_folder(site: Path, tmp_path: Path) -> None:
    def train(*arguments: str) -> str:
        done = run(site, tmp_path, sys.executable, "-m", "distributed.train", *arguments, "--device", "cpu")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    where = run(site, tmp_path, sys.executable, "-c", "import distributed; print(distributed.__file__)")
    assert where.stdout.startswith(str(site))
    assert "data_batch_1.bin: No such file" in train("seeds/I-10"), "extends ../cifar10.toml"
    refused = train("cifar11")
    assert [name for name in names() if name not in refused] == []
    assert "did you mean the shipped config seeds/S1-10?" in train("configs/seeds/S1-10.toml")
    (tmp_path / "mine.toml").write_text('extends = "cifar10_plateau"\noptim.lrr = 1\n')
    assert "mine.toml:2: optim.lrr = 1: unknown setting" in train("mine.toml")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.toml"]


def test_launch_slurm_submits_the_packaged_script(site: Path, tmp_path: Path) -> None:
    arguments = ("debug", "--device", "cpu", "--nodes", 2, "--dry-run", "--run_dir", tmp_path / "run")
    done = run(site, tmp_path, sys.executable, "-m", "launch.slurm", *arguments)
    assert done.returncode == 0, done.stderr
    script = next(Path(word) for word in shlex.split(done.stdout) if word.endswith(".sh"))
    assert script == site / "distributed/share/slurm/train.sh"
    assert script.is_file()
    if (Path(sys.prefix) / "bin/activate").is_file():
        assert f",VENV={sys.prefix}" in done.stdout
    assert "VENV=" not in run(site, tmp_path, sys.executable, "-m", "launch.slurm", *arguments, VENV="/other").stdout
    alone = run(site, tmp_path, "bash", script.with_name("cifar100.sh"), SLURM_JOB_ID="")
    assert (alone.returncode, alone.stderr) == (
        2,
        f"error: this is a batch script; submit it: sbatch {script.with_name('cifar100.sh')} ...\n",
    )


def test_ray_train_names_the_packaged_job_file(site: Path, tmp_path: Path) -> None:
    text = run(site, tmp_path, sys.executable, "-m", "launch.ray_train", "--help").stdout
    assert f"--runtime-env {site}/distributed/share/launch/ray_job.yaml " in text


@pytest.mark.parametrize(
    ("script", "arguments", "code", "expected"),
    [
        ("distributed-train", ("--help",), 0, "--optim.lr "),
        ("distributed-train", ("cifar10", "--optim.lrr", "1", "--device", "cpu"), 2, "did you mean optim.lr?"),
        ("distributed-evaluate", ("nowhere",), 2, "error: "),
        ("distributed-report", ("nowhere",), 2, "error: "),
    ],
)
def test_console_scripts_run_their_modules(
    site: Path, tmp_path: Path, script: str, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    done = run(site, tmp_path, site / "bin" / script, *arguments)
    assert done.returncode == code, done.stderr
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_source_package_is_complete_and_builds_quietly(source: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta as b; b.build_sdist('{tmp_path}'); b.build_editable('{tmp_path}')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        files = [member.name.partition("/")[2] for member in packed.getmembers() if member.isfile()]
    assert [name for name in SHIPPED if f"distributed/share/{name}" not in files] == []
    assert "careful" not in done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
