"""The files of this checkout to upload: tracked files, and untracked files that git does not ignore."""

import shutil
import subprocess
from pathlib import Path

from distributed.errors import InputError


def files(root: Path) -> list[Path]:
    """Return the paths to upload, relative to `root`.

    Raises:
        InputError: `root` is not the root of a git checkout.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (root / ".git").exists():
        raise InputError(f"{root}: not the root of a git checkout; run this in the root of one")
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise InputError(f"{root}: git ls-files: {listed.stderr.strip()}")
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in paths if (root / path).is_symlink() or (root / path).is_file()]


def copy(root: Path, to: Path) -> None:
    """Copy the files to upload, and nothing else, to a new folder."""
    for path in files(root):
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, to / path, follow_symlinks=False)


def size_of(root: Path) -> int:
    """Return the total size in bytes of the files to upload."""
    return sum((root / path).lstat().st_size for path in files(root))


def folder_size(folder: Path) -> int:
    """Return the total size in bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
