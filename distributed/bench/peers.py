"""The peers of `bench train`: other training frameworks, and an environment that has them.

The environment reads the packages of this one, torch included, and adds the frameworks.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from distributed.errors import InputError
from distributed.host.versions import require

_SHARED = ("torch", "torchvision", "numpy")  # pip must not replace these: all workloads compute with the same kernels
DEFAULT_PEERS = Path(".venv-bench")
"""Folder of the environment with the other frameworks."""

_MARKER = "bench-peers.json"
_NO_SYNC = "no synchronized batch norm on a CPU"
_NO_RESUME = "no bit-exact resume"


class Peer(NamedTuple):
    """A framework: the module to import, the requirement for pip, and what it does not do."""

    module: str
    requirement: str
    lacks: tuple[str, ...] = (_NO_SYNC, _NO_RESUME)


PEERS = {
    "timm": Peer("timm", "timm>=1.0.20"),
    "accelerate": Peer("accelerate", "accelerate>=1.10"),
    "lightning": Peer("lightning", "lightning>=2.5"),
}
"""The peers by workload. Their requirements are the extra `bench` of this package.

torch's SyncBatchNorm, which all of them use, rejects CPU tensors. timm saves no random states. With Lightning 2.6.6 and
accelerate 1.15.0 a small run with dropout that was stopped in mid-epoch and resumed had other weights than one that was not.
"""


def peer_python(folder: Path, peers: Sequence[str]) -> Path:
    """Return a Python that can import these peers: this one, or that of an environment in `folder`, made when needed.

    Raises:
        InputError: `folder` contains something else, or pip failed.
    """
    if all(_is_installed(PEERS[peer]) for peer in peers):
        return Path(sys.executable)
    python = folder.absolute() / "bin" / "python"  # not resolved: the link's place makes it the environment's
    if not (python.exists() and _marker(folder) == _wanted()):
        _make(folder)
    return python


def _is_installed(peer: Peer) -> bool:
    """Return whether this Python has the peer, in a version that is new enough."""
    package, _, version = peer.requirement.partition(">=")
    try:
        require(package, at_least=tuple(map(int, version.split("."))), needed_by=peer.module)
    except InputError:
        return False
    return True


def installed_versions(python: Path) -> dict[str, str]:
    """Return the versions of the peers that this Python can import."""
    code = "import json; from importlib.metadata import distributions as d; print(json.dumps({p.name: p.version for p in d()}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found = {name.lower().replace("_", "-"): version for name, version in json.loads(done.stdout).items() if name}
    names = [peer.requirement.partition(">")[0] for peer in PEERS.values()]
    return {name: found[name] for name in names if name in found}


def _make(folder: Path) -> None:
    """Make the environment, after removing an incomplete or outdated one."""
    if folder.exists() and any(folder.iterdir()) and _marker(folder) is None:
        raise InputError(f"--peers {folder}: has other content; name a new or empty folder")
    requirements = " ".join(peer.requirement for peer in PEERS.values())
    print(f"installing {requirements} in {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--peers {folder}: cannot be created: {error.strerror}; name another folder") from None
    (folder / _MARKER).write_text("{}")
    _run(folder, "venv", [sys.executable, "-m", "venv", str(folder)])
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # addsitedir also reads the .pth files there, e.g. of an editable install.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in _package_folders()]
    (Path(packages) / "_measured_environment.pth").write_text("".join(lines))
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={metadata.version(name)}\n" for name in _SHARED))
    install = ["install", "--quiet", "--disable-pip-version-check", "--retries", "2", "--constraint", str(constraints)]
    python = folder / "bin" / "python"
    _run(folder, "pip", [str(python), "-m", "pip", *install, *(peer.requirement for peer in PEERS.values())])
    modules = ", ".join(peer.module for peer in PEERS.values())
    _run(folder, "python", [str(python), "-c", f"import {modules}"])
    (folder / _MARKER).write_text(json.dumps(_wanted()))


def _run(folder: Path, program: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|[\w.]*Error)\b", line)]
        raise InputError(
            f"--peers {folder}: {program} failed: {(errors or lines or ['no output'])[-1]}; check pip's package index, or "
            "measure without other frameworks: --no-peers"
        )


def _package_folders() -> list[str]:
    """Return the folders from which this Python imports packages."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _wanted() -> dict[str, object]:
    """Describe the environment that this Python would make."""
    return {
        "requirements": [peer.requirement for peer in PEERS.values()],
        "folders": _package_folders(),
        "shared": {name: metadata.version(name) for name in _SHARED},
        "python": sys.version,
    }


def _marker(folder: Path) -> dict[str, object] | None:
    """Return what the folder's marker says: empty while incomplete, None if this module did not make the folder."""
    try:
        found: dict[str, object] = json.loads((folder / _MARKER).read_text())
    except (OSError, ValueError):
        return None
    return found
