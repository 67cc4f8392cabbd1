"""A small finished run, altered copies of it, and the commands that read them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from distributed.config import as_toml, from_command_line
from distributed.data.sources import synthetic
from distributed.data.sources.image_file import png_of
from distributed.files import digest_of, replace_json
from kit.commands import ROOT
from kit.speed import slowness

NORMALIZATION = {"mean": [0.5, 0.4, 0.3], "deviation": [0.2, 0.25, 0.3]}
CLASSES = [f"class <{letter}>" for letter in "abcdefghij"]


def image_folder(root: Path) -> Path:
    """Write an image folder: two classes with three images each, in both splits."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for place in range(3):
                Image.new("RGB", (8, 8), (40 * place, 0, 0)).save(root / split / name / f"{place}.png")
    return root


def command(module: str, *arguments: object, seconds: float = 200) -> subprocess.CompletedProcess[str]:
    """Run `python -m distributed.MODULE ARGUMENTS`."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-m", f"distributed.{module}", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds * slowness(), check=False,
    )  # fmt: skip


def train_small(folder: Path) -> Path:
    """Train two epochs on 300 generated images, a quarter of them held out for validation; 103 test images."""
    result = command(
        "train", "configs/debug.toml", "--device", "cpu", "--run_dir", folder,
        "--data.train_samples", 300, "--data.test_samples", 103,
        "--data.validation_fraction", 0.25, "--logging.every_steps", 2, "--schedule.name", "constant",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def newest(run: Path) -> Path:
    return (run / "checkpoints" / "latest").resolve()


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, symlinks=True)
    return to


def without_data(run: Path, to: Path, **content: Any) -> Path:
    """Copy a run, with a missing CIFAR-10 as its data set and `content` in its checkpoints; see `edit_state`."""
    copy_of(run, to)
    config = from_command_line([str(run / "config.toml")]).config
    values = config.model_dump(mode="json")
    values["data"] = {"name": "cifar10", "root": str(to / "nowhere")}
    (to / "config.toml").write_text(as_toml(type(config).model_validate_json(json.dumps(values))))
    for checkpoint in (to / "checkpoints").glob("step-*"):
        edit_state(checkpoint, **content)
    return to


def edit_state(checkpoint: Path, **content: Any) -> None:
    """Set keys of a checkpoint's state.json and update its manifest; None removes a key."""
    state = json.loads((checkpoint / "state.json").read_text()) | content
    replace_json(checkpoint / "state.json", {name: value for name, value in state.items() if value is not None})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = list(digest_of(checkpoint / "state.json"))
    replace_json(checkpoint / "manifest.json", manifest)


def damage(run: Path) -> Path:
    """Change one byte of each checkpoint's tensors."""
    for path in (run / "checkpoints").glob("step-*/tensors.safetensors"):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    return run


def write_test_images(folder: Path, count: int) -> list[Path]:
    """Write the first test images as PNG files."""
    import torch

    folder.mkdir()
    images = torch.from_numpy(synthetic.read("generated10", count, "test").images).permute(0, 3, 1, 2) / 255
    paths = [folder / f"image {place}.png" for place in range(count)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png_of(image))
    return paths
