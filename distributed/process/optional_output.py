"""Output files: failing to write an optional one is a warning, a requested one an error. Imports no torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from loguru import logger

from distributed.errors import InputError, StorageError


class OptionalOutput:
    """Context manager that turns any exception into one warning and sets `failed`.

    It guards outputs that training does not need. Third-party libraries (TensorBoard, matplotlib, torch.profiler) write
    them, so every type of exception is caught, except those that end the process.
    """

    def __init__(self, name: object) -> None:
        self.name, self.failed = name, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False  # no error, or KeyboardInterrupt and SystemExit
        self.failed = True
        logger.warning("{}: {}; continuing without it", self.name, one_line(error).removeprefix(f"{self.name}: "))
        return True

    def run(self, step: Callable[[], object]) -> None:
        """Run one of several steps. After a failure the remaining steps are skipped, so there is only one warning."""
        if not self.failed:
            with self:
                step()


@contextmanager
def requested_output(option: str, path: Path) -> Iterator[None]:
    """Context manager for writing a file that the user requested with `option`.

    Raises:
        StorageError: it could not be written.
        InputError: a package that it needs cannot be imported.
    """
    try:
        yield
    except StorageError:
        raise
    except ImportError as error:
        raise InputError(f"{option} {path}: {one_line(error)}; repair that package's installation") from None
    except OSError as error:
        raise StorageError(
            f"{option} {path}: not written: {error.strerror or error}; free disk space, or name another file"
        ) from None


def one_line(error: BaseException) -> str:
    """Return an error as one line: type and first line of its message, or file and reason of an operating system error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])
