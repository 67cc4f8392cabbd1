"""Ways to start a run on a cluster; each calls the same `distributed.recipe.train`."""

import sys
from importlib.util import find_spec
from pathlib import Path


def _check_distributed() -> None:
    """End a command with exit code 2, or raise ImportError in a program, if `distributed` is another package, e.g. dask's."""
    spec = find_spec("distributed")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    if not folders or any((folder / "name_clash.py").is_file() for folder in folders):
        return
    reason = (
        f"{folders[0]}: this package is not distributed-alexnet, but another of the same name (dask's?), which comes first on "
        "the path; use a separate environment, or: pip uninstall distributed dask"
    )
    # As in distributed/name_clash.py, which cannot be imported from here.
    if not (sys.argv[:1] == ["-m"] or Path(sys.argv[0]).name.startswith("distributed-")):
        raise ImportError(reason)
    print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)


_check_distributed()

from distributed import name_clash  # noqa: E402, F401  (checks on import, while sys.argv still says "-m")
