"""A user's own modules, for commands that a test calls in its own process."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let this process import the folder's modules, and forget them afterwards."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget(folder)


def forget(folder: Path) -> None:
    """Forget the folder's modules, so that the next import reads their files again."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if file and Path(file).parent == folder:
            del sys.modules[name]
    importlib.invalidate_caches()


@contextmanager
def started_in(folder: Path) -> Iterator[None]:
    """Let commands run as if `python -m` had started them in the folder, without a launcher."""
    with pytest.MonkeyPatch.context() as patch, importable(folder):
        patch.chdir(folder)
        for name in _OF_A_LAUNCHER:
            patch.delenv(name, raising=False)
        yield
