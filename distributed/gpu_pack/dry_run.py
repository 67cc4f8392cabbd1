"""Runs the commands of both calls on this machine: in a copy of the checkout, offline, with few packages visible."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distributed.data.sources.cifar_spec import CIFAR10
from distributed.errors import InputError
from distributed.gpu_pack import checkout, cifar_parts, wheels
from distributed.gpu_pack.calls import CALLS, MAX_BYTES_BACK, MAX_FILES_BACK, PARTS, WHEELS, Call

# For call 2, on generated images. The last --only wins; I-50 is the run whose checkpoint is returned.
_TRY_EXPERIMENTS = (
    "--only I-50 --data.name generated10 --data.train_samples 256 --data.test_samples 64 --epochs 1 --threads 1"
)


def dry_run(python: Path, numbers: Sequence[int], steps: Sequence[str]) -> None:
    """Run calls on this machine.

    Args:
        python: interpreter that the commands find as python3.
        numbers: of the calls to run, 1 and 2.
        steps: steps of the check in call 1; empty: all.

    Raises:
        InputError: a call failed, or would return more than the limits allow.
    """
    if not python.is_file():
        raise InputError(f"--python {python}: no such file; name an interpreter, e.g. .venv/bin/python")
    python = python.absolute()  # not resolved: the symlink is what selects its virtual environment
    with tempfile.TemporaryDirectory(prefix="gpu-dry-") as temporary:
        tree, folder = Path(temporary, "tree"), Path(temporary, "tmp")
        checkout.copy(Path.cwd(), tree)
        carried = wheels.download(tree / WHEELS, for_python=python)
        site = folder / "gpu" / "site"
        site.mkdir(parents=True)
        # Call 2 alone needs what call 1 would have left behind.
        first = tree / PARTS[0] if 1 in numbers else folder / "gpu" / PARTS[0].removeprefix(".")
        _pack_blank([first, tree / PARTS[1]])
        shown = sorted({*wheels.machine_packages(), *map(wheels.package_of, carried)})
        hide = [str(python), "-m", "distributed.gpu_pack.bare_machine", str(site), *shown]
        subprocess.run(hide, cwd=tree, env={}, check=True)
        offline = _offline()
        extra = {1: " ".join(["--tiny", *(["--only", *steps] if steps else [])]), 2: _TRY_EXPERIMENTS}
        for number in numbers:
            out = Path(temporary, f"out{number}")
            out.mkdir()
            environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "TMPDIR": str(folder), "OUT": str(out)}
            environment |= {"CHECK_DEVICE": "cpu", "CHECK_MORE": extra[number]}
            _run(CALLS[number - 1], [*offline, "bash", "-c", CALLS[number - 1].text], tree, environment, out)


def _run(call: Call, command: Sequence[str], tree: Path, environment: dict[str, str], out: Path) -> None:
    start = time.monotonic()
    code = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes = ", ".join(f"{path.relative_to(out)} {path.stat().st_size:,} bytes" for path in files)
    print(f"{call.name}: exit code {code} after {time.monotonic() - start:.0f} s; returned: {sizes}", flush=True)
    if code:
        raise InputError(f"{call.name}: its command exited with code {code}")
    if len(files) > MAX_FILES_BACK or any(path.stat().st_size > MAX_BYTES_BACK for path in files):
        raise InputError(f"{call.name}: at most {MAX_FILES_BACK} files of up to 16 MiB can be returned")
    if not list(out.glob("*.json*")):
        raise InputError(f"{call.name}: no result was returned")


def _pack_blank(parts: Sequence[Path]) -> None:
    """Pack files of CIFAR-10's size with black images of class 0."""
    blank = np.zeros((CIFAR10.train_records, 1 + 3072), np.uint8)
    form = CIFAR10.forms[0]
    cifar_parts.pack_files(dict.fromkeys((*form.train, form.test), blank), parts)


def _offline() -> list[str]:
    """Return a command prefix that cuts off every network but loopback; empty, with a warning, if not permitted."""
    loopback = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    for unshare in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        try:
            attempt = subprocess.run([*unshare, *loopback, "true"], capture_output=True, check=False)
        except FileNotFoundError:
            continue
        if attempt.returncode == 0:
            return [*unshare, *loopback]
    print(
        "warning: the commands can reach the network: `unshare --net` or `ip` is missing or not permitted",
        file=sys.stderr,
    )
    return []
