"""The errors a user can meet and the exit code that stands for each. No torch here: bad input ends before its import."""

import sys
from collections.abc import Callable
from enum import IntEnum
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


class ExitCode(IntEnum):
    """What a finished process says to whoever started it; `status.json` holds the same, because torchrun flattens it."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    NOT_FINITE = 3
    STORAGE = 4
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again; the same command goes on where this one stopped
    INTERRUPTED = 130


def plain(text: str) -> str:
    """The text with everything that a terminal would obey or that cannot be encoded escaped; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class _UserError:
    """An error with a message for the user and its own exit code."""

    exit_code: ExitCode

    def report(self) -> ExitCode:
        """Print the message to stderr, each line marked as an error. Returns the exit code."""
        lines = [f"error: {line}" for line in str(self).splitlines()]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        return self.exit_code


class InputError(_UserError, ValueError):
    """What the user gave cannot be used. Each line names the thing, the value and the remedy.

    Raised before any process group or GPU is touched; ends the process with `ExitCode.BAD_INPUT` and no traceback.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, *lines: str) -> None:
        super().__init__(plain("\n".join(lines)))
        self.lines = tuple(str(self).splitlines())  # of a pickled one too, whose lines come as one text


class NotFiniteError(ArithmeticError):
    """The loss became infinite or not a number; the message names the first bad step."""

    exit_code = ExitCode.NOT_FINITE


class StorageError(_UserError, OSError):
    """The run folder cannot be written, or belongs to a newer attempt; the last good checkpoint is intact."""

    exit_code = ExitCode.STORAGE


class PeerError(_UserError, RuntimeError):
    """Another rank is missing, has failed or was lost; the message names it. Ends with the exit code of the rank that
    failed, if that is known."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def prints_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a command's `main` to print an InputError, StorageError or PeerError and return its exit code."""

    @wraps(main)
    def printing(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except (InputError, StorageError, PeerError) as error:
            return error.report()

    return printing
