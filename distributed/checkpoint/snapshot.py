"""A snapshot of a run: written as a checkpoint, and read back."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed.checkpoint.tensor_file import write_tensors
from distributed.engine.protocol import Engine
from distributed.files import digest_of, read_json, replace_json
from distributed.run.checkpoint_layout import FORMAT, MANIFEST, STATE, TENSORS


@dataclass(frozen=True)
class Snapshot:
    """The tensors and the content of state.json of the checkpoint `name`. `best` is the best epoch's checkpoint, if any."""

    name: str
    tensors: dict[str, Tensor]
    content: dict[str, Any]
    best: str | None


def copy_to_host(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copy tensors to host memory. Copies from a GPU are asynchronous, on its current stream."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if tensor.is_cuda:
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copies[name] = pinned.copy_(tensor.detach(), non_blocking=True)
        else:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def write_checkpoint(aside: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write all files of a checkpoint into a new folder, the manifest last. Each is flushed to disk before the next."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    files = {TENSORS: write_tensors(aside / TENSORS, tensors)}
    replace_json(aside / STATE, content)
    files[STATE] = digest_of(aside / STATE)
    replace_json(aside / MANIFEST, {"format": FORMAT, "files": files})


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json.

    Raises:
        ValueError: it is not a JSON object with the expected keys.
    """
    content = read_json(path / STATE)
    if not isinstance(content, dict):
        raise ValueError(f"{STATE} is not a JSON object")
    if odd := [name for name in ("state", "config", "bits") if not isinstance(content.get(name, {}), dict)]:
        raise ValueError(f"{' and '.join(odd)} in {STATE}: from another version")
    return content


def load_weights_and_reset_optimizer(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Load weights, buffers and EMA, and reset the optimizer: `Engine.load_state` does so without the optimizer's tensors."""
    engine.load_state({name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "ema."))})
