"""A run's state at one moment: written as a checkpoint, and read back."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed.checkpoint.tensor_file import tensors_of, write_tensors
from distributed.engine.protocol import Engine
from distributed.files import digest_of, read_json, replace_json
from distributed.run.checkpoint_layout import FORMAT


@dataclass(frozen=True)
class Snapshot:
    """The tensors and the state.json of the checkpoint `name`; `best` names the best epoch's checkpoint, if there is one."""

    name: str
    tensors: dict[str, Tensor]
    content: dict[str, Any]
    best: str | None


def to_host(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Host copies. Copies from a GPU complete when its current stream gets here; does not synchronize."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if tensor.is_cuda:
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copies[name] = pinned.copy_(tensor.detach(), non_blocking=True)
        else:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def write_checkpoint(aside: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """All files of a checkpoint, the manifest last, each on the disk before the next."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    files = {"tensors.safetensors": write_tensors(aside / "tensors.safetensors", tensors)}
    replace_json(aside / "state.json", content)
    files["state.json"] = digest_of(aside / "state.json")
    replace_json(aside / "manifest.json", {"format": FORMAT, "files": files})


def state_of(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json.

    Raises:
        ValueError: it is not that of a checkpoint.
    """
    content = read_json(path / "state.json")
    if not isinstance(content, dict):
        raise ValueError("state.json is no object")
    if odd := [name for name in ("state", "config", "bits") if not isinstance(content.get(name, {}), dict)]:
        raise ValueError(f"{' and '.join(odd)} in state.json: of another version")
    return content


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Put a checkpoint's tensors into the engine; the content of its state.json.

    Raises:
        ValueError: the files do not fit this network, or are not a checkpoint.
    """
    content = state_of(path)
    engine.load_state(tensors_of(path))
    return content
