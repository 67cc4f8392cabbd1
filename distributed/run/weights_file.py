"""Tells a safetensors file of weights from other files, by its content. Imports no torch.

Files in Python's pickle format, e.g. of torch.save, can run any code when they are loaded, so they never are.
"""

import json
import os
import re
import shlex
import stat
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distributed.errors import InputError
from distributed.run.checkpoint_layout import TENSORS, find_checkpoint, is_committed

_PICKLE_NAMES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th", ".tar", ".zip")
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]|.{257}ustar", re.DOTALL)
_LFS_POINTER = b"version https://git-lfs"


def is_weights_file(path: Path) -> bool:
    """Return whether `init_from` names something other than a folder, which would be a run or a checkpoint."""
    return os.path.lexists(path) and not os.path.isdir(path)


def check_weights_file(path: Path) -> None:
    """Check that a file, usually from another program, is a complete safetensors file; reads its header only.

    Raises:
        InputError: it is not; the message says how to convert it if it is in another known format.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"init_from = {path}: not a regular file; name a run, a checkpoint or a .safetensors file")
        with path.open("rb") as file:
            head = file.read(262)
    except OSError as error:
        raise InputError(f"init_from = {path}: cannot be read ({error.strerror}); name another file") from None
    if path.name == TENSORS and is_committed(path.parent):
        raise InputError(f"init_from = {path}: a part of a checkpoint; name its folder, {path.parent}")
    if _PICKLE.match(head):
        raise InputError(f"init_from = {path}: {_how_to_convert(path)}")
    if head.startswith(_LFS_POINTER):
        raise InputError(f"init_from = {path}: a pointer of Git LFS, not the file itself; fetch it with git lfs pull")
    try:
        with safe_open(path, framework="np") as weights:
            names = list(weights.keys())
    except (SafetensorError, OSError, ValueError) as error:
        if path.suffix.lower() in _PICKLE_NAMES:
            raise InputError(f"init_from = {path}: {_how_to_convert(path)}") from None
        size = path.stat().st_size
        raise InputError(
            f"init_from = {path}: not a complete safetensors file, {size:,} bytes ({error}); copy it again, or name another"
        ) from None
    if not names:
        raise InputError(f"init_from = {path}: holds no tensors; name another file")


def check_weights_folder(path: Path) -> Path:
    """Return the checkpoint that a folder or link names.

    Raises:
        InputError: there is none; the message names safetensors files that are there instead.
    """
    try:
        return find_checkpoint(path)
    except InputError:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not files:
            raise
        advice = (
            f"name the file, {files[0]}" if len(files) == 1 else f"join its {len(files)} .safetensors files into one"
        )
        raise InputError(f"init_from = {path}: no checkpoint there; {advice}") from None


def _how_to_convert(path: Path) -> str:
    source, target = (as_literal(str(each)) for each in (path, path.with_suffix(".safetensors")))
    code = (
        "import torch, safetensors.torch as s; "
        f's.save_file({{k: v.clone() for k, v in torch.load({source}, "cpu", weights_only=True).items()}}, {target})'
    )
    return (
        "not a safetensors file, and a file that may be a pickle is never loaded; convert it once: python -c "
        f"{shlex.quote(code)}"
    )


def as_literal(text: str) -> str:
    """Return Python's literal of a string in double quotes, so that a command can be in single ones."""
    return json.dumps(text, ensure_ascii=False)
