"""Changes to a run's checkpoints on disk: links, retention, and what is damaged or unfinished. Imports no torch."""

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from loguru import logger

from distributed.run.checkpoint_layout import DAMAGED, DELETING, WRITING, checkpoints, is_committed, parse_name


def set_aside(path: Path, damage: str) -> None:
    """Rename a damaged or misnamed checkpoint so that it is never resumed from, and log an error. Overwrites nothing."""
    aside = _free(path.with_name(f"{path.name}{DAMAGED}"))
    path.rename(aside)
    logger.error("{} is damaged ({}): set aside as {}", path, damage, aside.name)


def _free(path: Path) -> Path:
    """Return this path or, if it exists, the first free one of NAME-2, NAME-3, ..."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def set_link(folder: Path, link: str, name: str) -> None:
    """Make the link `latest` or `best` point to the checkpoint of this name."""
    target, temporary = folder / link, folder / f".{link}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    if is_committed(target) and not target.is_symlink():  # scp and zip copy what a link leads to
        target.rename(_free(folder / f"{link}.copy"))
    os.replace(temporary, target)


def delete_old(folder: Path, *, newest: str, keep_last: int, keep: Collection[str | None]) -> None:
    """Delete all but the last `keep_last` checkpoints up to `newest`, and those named in `keep`.

    Each is renamed before it is deleted, so none is ever incomplete under its own name. Checkpoints later than `newest`
    are not this run's and stay.

    Raises:
        OSError: something could not be deleted. Everything else is; the next call tries again.
    """
    failures: list[OSError] = []
    own = [path for path in checkpoints(folder) if parse_name(path.name) <= parse_name(newest)]  # type: ignore[operator]
    old = [path for path in own[:-keep_last] if path.name not in keep]
    for path in (*folder.glob(f"{DELETING}*"), *old):
        try:
            if path in old:
                path = path.rename(path.with_name(f"{DELETING}{path.name}"))
            _delete(path)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def delete_unfinished(folder: Path) -> None:
    """Delete what a killed attempt left unfinished. Errors are ignored."""
    for path in (*folder.glob(f"{WRITING}*"), *folder.glob(f"{DELETING}*")):
        with suppress(OSError):
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a folder with its contents, or a link without its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
