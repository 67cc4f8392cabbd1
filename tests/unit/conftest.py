"""Fixtures of the unit tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a config file in the test's folder, and return its path."""

    def write(text: str, name: str = "run.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Restore torch's number of threads, which exact mode changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    """Let kernels run on one thread."""
    torch.set_num_threads(1)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not enter, even if it runs as root."""
    folder = tmp_path / "closed"
    folder.mkdir()
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
        folder.chmod(0o700)
        os.seteuid(65534)
        yield folder
        os.seteuid(0)
    else:
        folder.chmod(0)
        yield folder
        folder.chmod(0o700)
