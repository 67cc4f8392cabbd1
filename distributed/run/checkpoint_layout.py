"""The layout of checkpoints on disk: their names and files, and whether one is complete. Imports no torch.

    checkpoints/step-00000313-epoch-001/    after 313 steps and one finished epoch
        tensors.safetensors                 every tensor by its canonical name
        state.json                          counters, schedule, config, versions
        manifest.json                       sizes and digests of the other files; written last
    checkpoints/latest, best                links for people; resuming never relies on them
    checkpoints/.writing-*, .deleting-*     unfinished saves and deletions
    checkpoints/step-*.damaged              set aside, never resumed from
    checkpoints/latest.copy, best.copy      what a copied run had in place of its links; may be deleted

No other module spells these file names.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from distributed.errors import InputError
from distributed.files import Written, digest_of, is_unreachable, read_object

FORMAT = 1
TENSORS = "tensors.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
FILES = (TENSORS, STATE)
DAMAGED_MANIFEST = f"{MANIFEST}.damaged"
BEST, LATEST = "best", "latest"
_NAME = re.compile(r"step-(\d{8,})-epoch-(\d{3,})", re.ASCII)
WRITING, DELETING, DAMAGED = ".writing-", ".deleting-", ".damaged"


class SavedState(NamedTuple):
    """A checkpoint whose state.json is intact, and the content of that file."""

    checkpoint: Path
    content: dict[str, Any]


class NewestComplete(NamedTuple):
    """The newest complete checkpoint, if any, and the newer damaged ones, each with its damage."""

    checkpoint: Path | None
    damaged: dict[Path, str]


def name_of(*, step: int, epoch: int) -> str:
    """Return the name of a checkpoint after this many steps and finished epochs.

    The epoch is part of the name because a save after an epoch's last step and one after its evaluation have the same
    step.
    """
    return f"step-{step:08d}-epoch-{epoch:03d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Return (step, epoch), or None if `name_of` does not produce this name, e.g. because its numbers are wider."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    step, epoch = int(match[1]), int(match[2])
    return (step, epoch) if name_of(step=step, epoch=epoch) == name else None


def sort_names(names: Iterable[str]) -> list[str]:
    """Return the names of checkpoints among `names`, oldest first."""
    parsed = {place: name for name in names if (place := parse_name(name))}
    return [parsed[place] for place in sorted(parsed)]


def step_of(state: Mapping[str, Any] | None) -> int | None:
    """Return the step according to the content of a state.json."""
    counters = (state or {}).get("state")
    step = counters.get("step") if isinstance(counters, dict) else None
    return step if isinstance(step, int) else None


def best_name(state: Mapping[str, Any]) -> str | None:
    """Return the name of the best epoch's checkpoint according to the content of a state.json."""
    try:
        best = state["state"]["best"]
        return name_of(step=best["step"], epoch=best["epoch"] + 1) if best else None
    except (KeyError, TypeError, ValueError):
        return None


def best_known_to(checkpoint: Path) -> str | None:
    """Return the name of the best epoch's checkpoint according to this one. Raises OSError if it is out of reach."""
    return best_name(read_object(checkpoint / STATE, reachable=True))


def checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints of a run, oldest first. Folders with other names, e.g. copies, are ignored."""
    names = sort_names(path.name for path in folder.glob("step-*"))
    return [folder / name for name in names if (folder / name).is_dir()]


def is_committed(checkpoint: Path) -> bool:
    """Whether the folder has a manifest. Its files may have been damaged since."""
    return os.path.isfile(checkpoint / MANIFEST)  # unlike Path.is_file, False for a name that is too long


def committed_names(folder: Path) -> list[str]:
    """Return the names of all folders and links with a manifest, copies under other names included."""
    return sorted(path.name for path in folder.glob("[!.]*") if is_committed(path))


def preferred(folder: Path) -> list[Path]:
    """Return the checkpoints that a run folder may refer to, by preference: best, latest, then newest first.

    A copied run may lack the links, or have copies of checkpoints in their place, which go out of date when it is resumed.
    """
    newest_first = checkpoints(folder)[::-1]
    best, latest = folder / BEST, folder / LATEST
    if newest_first and not best.is_symlink():
        best = folder / (best_known_to(newest_first[0]) or newest_first[0].name)
    if newest_first and not latest.is_symlink():
        latest = newest_first[0]
    return [best, latest, *newest_first]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `init_from` names: the path itself, or the run's best, or its newest.

    Raises:
        InputError: no checkpoint is there.
    """
    for candidate in (path, *preferred(path / "checkpoints")):
        if is_committed(candidate):
            return candidate.resolve()
    raise InputError(
        f"init_from = {path}: no checkpoint there; name a run that has saved, a checkpoint or a .safetensors file"
    )


def saved_or_damaged(folder: Path) -> list[Path]:
    """Return the committed checkpoints and those set aside as damaged. If any exists, the run has saved."""
    damaged = [path for path in folder.glob(f"step-*{DAMAGED}*") if parse_name(path.name.partition(".")[0])]
    return [*checkpoints(folder), *damaged]


def check_format(path: Path) -> None:
    """Raise InputError if a newer version of this code wrote the checkpoint. This version would treat it as damaged."""
    form = read_object(path / MANIFEST).get("format")
    if type(form) is int and form > FORMAT:
        raise InputError(
            f"{path}: written by a newer version of this code, in format {form} (this one reads up to {FORMAT}): use that "
            "version, or start another run"
        )


def check_formats(folder: Path) -> None:
    """Call `check_format` for every checkpoint of a run."""
    for path in checkpoints(folder):
        check_format(path)


def damage_of(path: Path) -> str | None:
    """Return how a checkpoint disagrees with its manifest, or None if it is complete.

    Raises:
        OSError: it is out of reach, e.g. for this user; that is not damage.
    """
    manifest = read_object(path / MANIFEST, reachable=True)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("format") != FORMAT or set(files) != set(FILES):
        return "no manifest of a known format"
    for name, expected in files.items():
        try:
            found = digest_of(path / name)
        except OSError as error:
            if is_unreachable(error):
                raise
            return f"{name}: {error.strerror}"
        if list(found) != expected:
            return f"{name}: {found.bytes} bytes with another digest than the manifest's"
    return None


def misnamed(path: Path) -> str | None:
    """Return how a checkpoint contradicts its name, e.g. if it is a copy under a later step's name; else None."""
    state = read_object(path / STATE).get("state")
    step, epoch = (state.get("step"), state.get("epoch")) if isinstance(state, dict) else (None, None)
    if type(step) is not int or type(epoch) is not int or name_of(step=step, epoch=epoch) == path.name:
        return None  # counters that are not integers are reported elsewhere
    return f"it holds step {step} after {epoch} epochs"


def newest_complete(folder: Path) -> NewestComplete:
    """Find the newest complete checkpoint by checking every file of it and of the newer, damaged ones."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        damage = damage_of(path) or misnamed(path)
        if damage is None:
            return NewestComplete(path, damaged)
        damaged[path] = damage
    return NewestComplete(None, damaged)


def newest_saved(folder: Path, *, reachable: bool = False) -> SavedState | None:
    """Find the newest checkpoint whose state.json is intact. Fast, because it does not read the tensors.

    Args:
        reachable: raise OSError if one is out of reach, which otherwise counts as not intact.
    """
    for _ in range(2):  # again: an attempt that is ending may have replaced all of them meanwhile
        for path in reversed(checkpoints(folder)):
            content = read_object(path / STATE, reachable=reachable)
            with suppress(FileNotFoundError):  # deleted since
                manifest = read_object(path / MANIFEST, reachable=reachable)
                if content and is_intact(manifest, content, digest_of(path / STATE)):
                    return SavedState(path, content)
    return None


def is_intact(manifest: Mapping[str, Any], content: Mapping[str, Any], written: Written) -> bool:
    """Whether a state.json with this content, size and digest matches its manifest and has a config and `bits`."""
    files = manifest.get("files")
    expected = files.get(STATE) if isinstance(files, dict) else None
    return expected == list(written) and all(isinstance(content.get(key), dict) for key in ("config", "bits"))


def unfinished(folder: Path, name: str, *, token: str = "") -> Path:
    """Return the path under which a checkpoint is written before it is committed. Each token has its own path."""
    return folder / f"{WRITING}{name}{'-' if token else ''}{token[:8]}"
