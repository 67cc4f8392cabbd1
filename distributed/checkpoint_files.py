"""A checkpoint as it lies on the disk: its name, its files, whether it is whole. Imports no torch."""

import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.errors import InputError
from distributed.files import digest_of, read_object

FORMAT = 1
FILES = ("tensors.safetensors", "state.json")
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})-epoch-(\d{3,})", re.ASCII)


def name_of(*, step: int, epoch: int) -> str:
    """After so many steps and finished epochs. An epoch's end has the steps of its last step, but knows more."""
    return f"step-{step:08d}-epoch-{epoch:03d}"


def best_in(state: dict[str, Any]) -> str | None:
    """The name of the best epoch's checkpoint, by a state.json."""
    try:
        best = state["state"]["best"]
        return name_of(step=best["step"], epoch=best["epoch"] + 1) if best else None
    except (KeyError, TypeError):
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first; a folder of any other name is somebody else's, a copy for example."""
    found = [(int(m[1]), int(m[2]), path) for path in folder.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, _, path in sorted(found) if path.is_dir()]


def check_format(path: Path) -> None:
    """Raises InputError if a newer version of this code wrote the checkpoint, which this one would call damaged."""
    form = read_object(path / MANIFEST).get("format")
    if type(form) is int and form > FORMAT:
        raise InputError(
            f"{path}: written by a newer version of this code, in format {form} (this one reads up to {FORMAT}): use that "
            "version, or start another run"
        )


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None where it is whole."""
    manifest = read_object(path / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("format") != FORMAT or set(files) != set(FILES):
        return "no manifest of a known format"
    for name, expected in files.items():
        try:
            found = digest_of(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if list(found) != expected:
            return f"{name}: {found.bytes} bytes with another digest than the manifest's"
    return None


def newest_whole(folder: Path) -> str | None:
    """The name of the newest complete checkpoint; damaged ones that are newer are set aside, loudly."""
    sweep(folder)
    for path in reversed(checkpoints(folder)):
        damage = damage_of(path)
        if damage is None:
            return path.name
        logger.error(
            "{} is damaged ({}): set aside as {}.damaged; falling back to the previous one", path, damage, path.name
        )
        shutil.rmtree(path.with_name(f"{path.name}.damaged"), ignore_errors=True)
        path.rename(path.with_name(f"{path.name}.damaged"))
    return None


def point(folder: Path, link: str, name: str) -> None:
    """Let a link lead to the checkpoint of that name."""
    aside = folder / f".{link}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, folder / link)


def retain(folder: Path, *, keep_last: int, kept: Collection[str | None]) -> None:
    """Delete all but the newest few and those named. One that goes is renamed first, so none is ever half there."""
    for path in checkpoints(folder)[:-keep_last]:
        if path.name not in kept:
            gone = path.with_name(f".deleting-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Delete what a killed attempt left unfinished."""
    leftovers: Iterable[Path] = [*folder.glob(".writing-*"), *folder.glob(".deleting-*")]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
