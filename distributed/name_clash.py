"""Refuses to run, when imported, if dask's package `distributed` is installed into the same folder. Imports no torch.

pip installs both packages into site-packages/distributed/ and overwrites files without a warning. If dask's `__init__.py` has
replaced ours, its first statement imports `distributed.config`. That is our folder, so it imports this module too.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).parent


def _check() -> None:
    """End a command with exit code 2, or raise ImportError in a program, if dask's files are in this folder."""
    if not (clashing := _clashing(_PACKAGE.parent)):
        return
    reason = (
        f"{_PACKAGE}: dask's package of the same name ({clashing}) overwrites files of distributed-alexnet; use a separate "
        "environment, or: pip uninstall distributed dask; pip install --force-reinstall --no-deps CHECKOUT (the "
        "folder of this project)"
    )
    if not starts_command():
        raise ImportError(reason)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {reason}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all ranks as soon as one exits: let local rank 0 print first
    os._exit(2)


def starts_command() -> bool:
    """Whether this process has just been started by `python -m` or as a `distributed-` command."""
    # `python -m` imports a module's packages before it replaces "-m" by the module's path.
    return sys.argv[:1] == ["-m"] or Path(*sys.argv[:1]).name.startswith("distributed-")


def _clashing(site: Path) -> str | None:
    """Return the metadata folder of a package named exactly `distributed`, e.g. distributed-2026.1.0.dist-info."""
    with suppress(OSError):
        for name in os.listdir(site):
            if name.startswith("distributed-") and name.endswith((".dist-info", ".egg-info")):
                return name
    return None


_check()
