"""Data files of this package: configs, batch scripts, Ray's job file. Imports no torch.

In a checkout they are in top-level folders. An installed package has them in `distributed/share/`, whose symlinks are
replaced by their targets at build time.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_CHECKOUT = _PACKAGE.parent


def shipped(path: str) -> Path:
    """Return the path of a data file or folder, e.g. of `slurm/train.sh`."""
    in_checkout = (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / path).exists()
    return (_CHECKOUT if in_checkout else _PACKAGE / "share") / path
