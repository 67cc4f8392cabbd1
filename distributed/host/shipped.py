"""Files that ship beside the code: configs, batch scripts, Ray's job file. Imports no torch.

In a checkout they are the top-level folders; an installed package has them in `distributed/share/`, whose symlinks the
build replaces with their targets.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_CHECKOUT = _PACKAGE.parent


def shipped(path: str) -> Path:
    """The place of a shipped file or folder, e.g. `slurm/train.sh`."""
    in_checkout = (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / path).exists()
    return (_CHECKOUT if in_checkout else _PACKAGE / "share") / path
