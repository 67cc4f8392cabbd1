"""Freed memory stays in the process, unless the user has set the C library's allocator."""

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from distributed.process.allocator import keep_freed_memory

keep_freed_memory()
bytearray(48 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(48 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 48 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def page_faults(**environment: str) -> int:
    """Return the page faults of four allocations of the same size."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=inherited | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_memory_is_used_again() -> None:
    assert page_faults() < PAGES / 50


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_settings_of_the_user_are_kept(setting: dict[str, str]) -> None:
    assert page_faults(**setting) > PAGES / 2
