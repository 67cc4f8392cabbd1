"""Run folders without training: configs and complete checkpoints without tensors."""

import json
from pathlib import Path
from typing import Any

from distributed.config import TrainConfig, from_command_line
from distributed.files import digest_of
from distributed.optim.schedules import build_early_stopping, build_schedule
from distributed.run.checkpoint_layout import FORMAT, name_of
from distributed.training.state import TrainState


def config_of(path: Path, *arguments: str) -> TrainConfig:
    return from_command_line(["--run_dir", str(path), *arguments]).config


def checkpointed(path: Path, config: TrainConfig, step: int = 10, epoch: int = 1, **bits: Any) -> Path:
    """Create a complete checkpoint at the end of an epoch, as a run would save it, but without tensors."""
    folder = path / "checkpoints" / name_of(step=step, epoch=epoch)
    folder.mkdir(parents=True)
    state = TrainState(
        build_schedule(config, steps_per_epoch=step // epoch), build_early_stopping(config.early_stopping)
    )
    state.epoch, state.step, state.samples_seen = epoch, step, step * config.global_batch_size
    content = {
        "state": state.state_dict(),
        "config": json.loads(config.model_dump_json()),
        "bits": {"shards": config.shards_on("cpu")} | bits,
    }
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "tensors.safetensors").write_bytes(b"")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write a manifest that matches the files."""
    files = {name: digest_of(folder / name) for name in ("tensors.safetensors", "state.json")}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}))
