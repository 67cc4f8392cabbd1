"""Control groups of this machine with a limit."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


def limited_group(candidates: dict[Path, str], value: int, *, noun: str) -> Iterator[Path]:
    """Yield a new control group below the first parent that allows one, and remove it afterwards; else skip the test.

    Args:
        candidates: parent folder -> name of the file that takes the limit.
        noun: what the reason for skipping calls it.
    """
    for parent, limit in candidates.items():
        folder = parent / f"test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(value))
        except OSError:
            folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip(f"no {noun} can be created here")
