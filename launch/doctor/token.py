"""A file in the run folder by which nodes show that they share it. Imports no torch."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed.errors import InputError


@contextmanager
def token_in(run_dir: Path, prefix: str) -> Iterator[str]:
    """Write a file that every node should see, and yield its name. Removes it, and those that the nodes add, on exit.

    Raises:
        InputError: the folder cannot be written.
    """
    token = f"{prefix}-{uuid.uuid4().hex[:12]}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / token).touch()
    except OSError as error:
        raise InputError(f"run_dir = {run_dir}: {error.strerror}; give another with --run_dir") from None
    try:
        yield token
    finally:
        for file in run_dir.glob(f"{token}*"):
            file.unlink(missing_ok=True)
