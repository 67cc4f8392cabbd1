"""dask's package `distributed` in the same environment: installed before or after ours, or first on the path."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from kit.commands import ROOT, torchrun
from kit.speed import slowness

DASK_INIT = "from distributed import config\nfrom distributed.metrics import time\n"  # the first lines of dask's
REMEDY = "pip uninstall distributed dask; pip install --force-reinstall --no-deps CHECKOUT"


def install_dask(site: Path, *, first: bool = False) -> None:
    """Write what pip leaves of dask's package; with `first`, ours was installed later and overwrote its files."""
    info = site / "distributed-2026.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: distributed\nVersion: 2026.1.0\n")
    (info / "RECORD").write_text(
        "distributed/__init__.py,,\ndistributed/comm/__init__.py,,\ndistributed/metrics.py,,\n"
    )
    (site / "distributed/comm").mkdir(parents=True, exist_ok=True)
    (site / "distributed/metrics.py").write_text("from time import time\n")
    if not first:
        (site / "distributed/__init__.py").write_text(DASK_INIT)
        (site / "distributed/comm/__init__.py").write_text("")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of what installing this project writes."""
    target = tmp_path / "site"
    for name in ("distributed", "launch"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "share"))
    return target


def run(
    site: Path, *command: object, cwd: Path | None = None, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), **(more or {})}
    return subprocess.run(
        list(map(str, command)), cwd=cwd or site.parent, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip


def python(*arguments: object) -> list[object]:
    return [sys.executable, "-m", *arguments]


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("first", [False, True], ids=["dask last", "dask first"])
@pytest.mark.parametrize("module", ["distributed.train", "distributed.runs", "launch.slurm", "launch.ray_train"])
def test_a_shared_folder_is_refused(site: Path, module: str, first: bool) -> None:
    install_dask(site, first=first)
    done = run(site, *python(module, "debug", "--device", "cpu"))
    assert_refused(done, f"{site}/distributed: ", "distributed-2026.1.0.dist-info", REMEDY)


@pytest.mark.parametrize("first", [False, True], ids=["dask last", "dask first"])
def test_console_scripts_refuse_a_shared_folder(site: Path, tmp_path: Path, first: bool) -> None:
    install_dask(site, first=first)
    script = tmp_path / "distributed-train"
    script.write_text("import sys\nfrom launch.scripts import train\nsys.exit(train())\n")  # as pip writes it
    assert_refused(run(site, sys.executable, script), REMEDY)


@pytest.mark.parametrize("first", [False, True], ids=["dask last", "dask first"])
def test_programs_get_an_import_error(site: Path, first: bool) -> None:
    install_dask(site, first=first)
    done = run(site, sys.executable, "-c", "import distributed")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ")
    assert REMEDY in done.stderr.splitlines()[-1]


def test_torchrun_prints_the_reason_once_per_node(site: Path) -> None:
    install_dask(site)
    done = run(site, *torchrun(2, "debug", "--device", "cpu"))
    assert done.returncode == 1, "torchrun's own exit code"
    assert [REMEDY in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert "exitcode  : 2" in done.stderr


def test_a_checkout_works_beside_dask(tmp_path: Path) -> None:
    install_dask(tmp_path / "site")
    done = run(tmp_path / "site", *python("distributed.train", "--optim.lrr", 1, "--device", "cpu"), cwd=ROOT)
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr


@pytest.mark.parametrize("module", ["launch.slurm", "launch.ray_train", "launch.doctor"])
def test_dask_before_the_checkout_on_the_path_is_refused(tmp_path: Path, module: str) -> None:
    """Like an editable installation, whose folder is last on the path."""
    install_dask(tmp_path / "site")
    done = run(tmp_path, *python(module, "--device", "cpu"), more={"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"})
    assert_refused(
        done, f"{tmp_path / 'site'}/distributed: ", "not distributed-alexnet", "pip uninstall distributed dask"
    )


def test_the_check_costs_less_than_five_milliseconds(site: Path) -> None:
    for place in range(500):  # the packages of a large environment
        (site / f"package{place}-1.0.dist-info").mkdir()
    measured = []
    for _ in range(5):  # the smallest: another process may use the CPU meanwhile
        done = run(site, sys.executable, "-X", "importtime", "-c", "import distributed.name_clash")
        lines = [line for line in done.stderr.splitlines() if line.endswith("distributed.name_clash")]
        measured.append(sum(int(line.split("|")[0].removeprefix("import time:")) for line in lines))
    assert 0 < min(measured) < 5000 * slowness()
