"""Downloads wheels of the packages that a run imports and the rented machine lacks."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from distributed.errors import InputError

ROOTS = ("pydantic", "loguru", "tomli-w", "greenlet")  # pip adds their requirements
MACHINE_PYTHON = "3.12"
# pip matches platforms literally: it finds no wheel for glibc 2.24 under manylinux_2_28.
_PLATFORMS = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1))]


def normalized(name: str) -> str:
    """Return the name in the form in which package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def machine_packages() -> frozenset[str]:
    """Return the normalized names of the packages in machine.txt."""
    lines = Path(__file__).with_name("machine.txt").read_text().splitlines()
    return frozenset(normalized(line) for line in lines if line and not line.startswith("#"))


def download(folder: Path, *, for_python: Path | None = None) -> list[Path]:
    """Replace the content of `folder` with wheels from the index that pip is configured with.

    Args:
        for_python: interpreter of this machine whose version the wheels must fit; None: the rented machine's version.

    Raises:
        InputError: pip cannot download them, or a wheel needs a package that neither the machine nor another wheel has.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [str(for_python or sys.executable), "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    if for_python is None:
        command += ["--python-version", MACHINE_PYTHON, "--implementation", "cp"]
        command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    pip = subprocess.run([*command, "--dest", str(folder), *ROOTS], capture_output=True, text=True, check=False)
    if pip.returncode:
        reason = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or ["pip gives no reason"]
        raise InputError(f"pip cannot download the wheels: {reason[-1].removeprefix('ERROR: ')}")
    wheels = sorted(folder.glob("*.whl"))
    if lacking := unmet(wheels, machine_packages()):
        raise InputError(
            f"{', '.join(sorted(lacking))}: required by a carried wheel, but missing on the rented machine"
        )
    return wheels


def package_of(wheel: Path) -> str:
    """Return the normalized name of a wheel's package."""
    return normalized(wheel.name.partition("-")[0])


def unmet(wheels: list[Path], machine: frozenset[str]) -> set[str]:
    """Return normalized names of packages that these wheels require on Linux, and that neither they nor the machine have."""
    provided = machine | {package_of(wheel) for wheel in wheels}
    return {name for wheel in wheels for name in _requirements(wheel)} - provided


def _requirements(wheel: Path) -> set[str]:
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
    machine = {"python_version": MACHINE_PYTHON, "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    required = [Requirement(line) for line in lines]
    return {normalized(one.name) for one in required if one.marker is None or one.marker.evaluate(machine)}
