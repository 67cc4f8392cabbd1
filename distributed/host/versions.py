"""Versions of Python, of packages and of this code. Imports no torch."""

import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from distributed.errors import InputError

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "distributed-alexnet")


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state() -> str:
    """Return the commit of this code, with `+changes` if files were modified; empty outside a checkout."""
    here = Path(__file__).parents[2]
    if not (here / "pyproject.toml").is_file():  # installed, perhaps inside another project's checkout
        return ""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            cwd=here, capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def require_deepspeed() -> None:
    """Raise InputError if DeepSpeed is missing or too old."""
    require("deepspeed", at_least=(0, 19), needed_by="engine.name = deepspeed")


def require(package: str, *, at_least: tuple[int, ...], needed_by: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        needed_by: the option or setting that needs it, for the message.

    Raises:
        InputError: it is missing or too old.
    """
    wanted = ".".join(map(str, at_least))
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise InputError(f"{needed_by} needs the package {package}: pip install '{package}>={wanted}'") from None
    if tuple(map(int, re.findall(r"\d+", found)[: len(at_least)])) < at_least:
        raise InputError(
            f"{needed_by} needs {package} {wanted} or later, but {found} is installed: pip install '{package}>={wanted}'"
        )
