"""A checkpoint as it lies on the disk: its name, its files, whether it is whole. Imports no torch."""

import os
import re
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
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


def place_of(name: str) -> tuple[int, int] | None:
    """(step, epoch) of a checkpoint's name, to sort by; None if `name_of` does not give that name, e.g. in another width."""
    found = _NAME.fullmatch(name)
    place = (int(found[1]), int(found[2])) if found else None
    return place if place and name_of(step=place[0], epoch=place[1]) == name else None


def in_order(names: Iterable[str]) -> list[str]:
    """Those that are names of checkpoints, oldest first."""
    places = {place: name for name in names if (place := place_of(name))}
    return [places[place] for place in sorted(places)]


def best_in(state: dict[str, Any]) -> str | None:
    """The name of the best epoch's checkpoint, by a state.json."""
    try:
        best = state["state"]["best"]
        return name_of(step=best["step"], epoch=best["epoch"] + 1) if best else None
    except (KeyError, TypeError, ValueError):
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first; any other name is somebody else's, e.g. that of a copy."""
    names = in_order(path.name for path in folder.glob("step-*"))
    return [folder / name for name in names if (folder / name).is_dir()]


def traces(folder: Path) -> list[Path]:
    """Checkpoints that are there and those that were set aside as damaged: a run has saved here."""
    return [
        *checkpoints(folder),
        *(path for path in folder.glob("step-*.damaged*") if place_of(path.name.partition(".")[0])),
    ]


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


def foreign_name(path: Path) -> str | None:
    """Why a checkpoint is not the one that its name says, e.g. a copy under a later step's name; None if it is."""
    state = read_object(path / "state.json").get("state")
    step, epoch = (state.get("step"), state.get("epoch")) if isinstance(state, dict) else (None, None)
    if type(step) is not int or type(epoch) is not int or name_of(step=step, epoch=epoch) == path.name:
        return None  # what is no number there has its own message
    return f"it holds step {step} after {epoch} epochs"


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest complete checkpoint, and the newer ones that are damaged, each with its damage."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        damage = damage_of(path) or foreign_name(path)
        if damage is None:
            return path, damaged
        damaged.append((path, damage))
    return None, damaged


def set_aside(path: Path, damage: str) -> None:
    """Give a damaged or foreign checkpoint a name that nobody resumes from, loudly; what has that name already is kept."""
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    logger.error("{} is damaged ({}): set aside as {}", path, damage, aside.name)


def point(folder: Path, link: str, name: str) -> None:
    """Let a link lead to the checkpoint of that name."""
    aside = folder / f".{link}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    os.replace(aside, folder / link)


def retain(folder: Path, *, newest: str, keep_last: int, kept: Collection[str | None]) -> None:
    """Delete all but the last few up to the newest, and those named. One that goes is renamed first, so none is ever half
    there. What stands under a later name than the newest is not this run's, and stays.

    Raises:
        OSError: something could not be deleted, after trying all; the next call tries again.
    """
    failures: list[OSError] = []
    there = [path for path in checkpoints(folder) if place_of(path.name) <= place_of(newest)]  # type: ignore[operator]
    going = [path for path in there[:-keep_last] if path.name not in kept]
    for path in (*folder.glob(".deleting-*"), *going):
        try:
            if path in going:
                path = path.rename(path.with_name(f".deleting-{path.name}"))
            _delete(path)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def sweep(folder: Path) -> None:
    """Delete what a killed attempt left unfinished, if that can be deleted."""
    for path in (*folder.glob(".writing-*"), *folder.glob(".deleting-*")):
        with suppress(OSError):
            _delete(path)


def _delete(path: Path) -> None:
    """A folder and all in it; of a link only the link, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
