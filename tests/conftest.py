"""Rules for every test: it sets its device and leaves the environment and process group unchanged."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
from kit import devices
from kit.speed import slowness
from kit.user_modules import importable

# For this process and its children: idle threads must not take cores from processes that have work.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
devices.check_started_commands()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--max-ranks", type=int, help="skip tests that start more ranks than this")
    parser.addoption("--skips", type=Path, help="file to append a line to for each reason why tests were skipped")


def pytest_configure(config: pytest.Config) -> None:
    use_own_temporary_folder()
    if most := config.getoption("--max-ranks"):
        from kit import ranks

        ranks.MAX_RANKS = most


def use_own_temporary_folder() -> None:
    """Let this process and its children put temporary files into one folder, which is removed at the end.

    Two things stay in the common one: pytest's folders, to look at after a failure, and compiled kernels, to use again.
    """
    common, own = tempfile.gettempdir(), tempfile.mkdtemp(prefix="t-")  # short: a socket's path has at most 107 bytes
    Finalize(None, shutil.rmtree, (own, True), exitpriority=-200)  # after multiprocessing's own folder in it: -100
    os.chmod(own, 0o1777)  # some tests act as another user
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", common)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{common}/torchinductor-{os.geteuid()}")
    os.environ |= {"TMPDIR": own, "WANDB_CACHE_DIR": f"{own}/wandb"}
    tempfile.tempdir = None  # reads TMPDIR again


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Scale the time limit of each test with the machine's speed."""
    default = float(config.getini("timeout") or 0)
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0] if marker else default)
        item.add_marker(pytest.mark.timeout(seconds * slowness()), append=False)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    file: Path | None = config.getoption("--skips")
    if not file:
        return
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    with file.open("a") as lines:
        for reason, count in reasons.most_common():
            lines.write(f"skipped {count}: {reason}\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hide GPUs from every test without the marker `gpu`, and from its fixtures of any scope."""
    if item.get_closest_marker("gpu"):
        return (yield)
    with devices.no_gpus():
        return (yield)


@pytest.fixture(autouse=True, scope="module")
def freeze_loaded_objects() -> None:
    """Keep the garbage collection at the end of each run from traversing everything that is loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def restore_environment() -> Iterator[None]:
    """Restore environment variables; fail the test if it left a process group initialized."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
    dist = sys.modules.get("torch.distributed")  # not imported here: most config tests need no torch
    if dist and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group initialized")


@pytest.fixture
def restore_threads_and_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check the device and restore threads and log handlers, for tests that train in their own process."""
    import torch
    from loguru import logger

    from distributed import recipe

    choose = recipe.choose_device

    def choose_device(setting: str, topology: Any) -> torch.device:
        devices.check_setting(setting)
        return choose(setting, topology)

    monkeypatch.setattr(recipe, "choose_device", choose_device)
    threads = torch.get_num_threads()
    logger.remove()
    yield
    logger.remove()
    torch.set_num_threads(threads)


@pytest.fixture
def log_messages() -> Iterator[list[str]]:
    """Messages logged at WARNING and above."""
    from loguru import logger

    lines: list[str] = []
    handle = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(handle)


@pytest.fixture
def own_data(tmp_path: Path) -> Iterator[None]:
    """The module own_data with a user's arrays, which this process can import."""
    from kit.arrays import write_module

    write_module(tmp_path)
    with importable(tmp_path):
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2M,mode=755", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
