"""By-products of a run: a failure is one warning. Failing to write a requested file is an error. Imports no torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from loguru import logger

from distributed.errors import InputError, StorageError


class Byproduct:
    """A context around the making of a by-product. Any error in it is a warning; `failed` is then set.

    Foreign libraries make them (TensorBoard, matplotlib, torch's profiler), so that every kind of error is caught.
    """

    def __init__(self, name: object) -> None:
        self.name, self.failed = name, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False  # none, or a request to end the process
        self.failed = True
        why = reason(error).removeprefix(f"{self.name}: ")
        logger.warning("{}: {}; continuing without it", self.name, why)
        return True

    def attempt(self, step: Callable[[], object]) -> None:
        """Take one of several steps; none after one that failed, so that there is one warning."""
        if not self.failed:
            with self:
                step()


@contextmanager
def asked_for(option: str, path: Path) -> Iterator[None]:
    """A context around the writing of a file that a command was asked for.

    Raises:
        StorageError: it could not be written.
        InputError: a package that it needs cannot be imported.
    """
    try:
        yield
    except StorageError:
        raise
    except ImportError as error:
        raise InputError(f"{option} {path}: {reason(error)}; repair that package's installation") from None
    except OSError as error:
        raise StorageError(
            f"{option} {path}: not written: {error.strerror or error}; free disk space, or name another file"
        ) from None


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])
