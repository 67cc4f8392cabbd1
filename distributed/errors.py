"""The errors that users may see, and the exit code of each. Imports no torch: bad input is refused before that import."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


class ExitCode(IntEnum):
    """The exit code of a process; `status.json` holds it too, because torchrun replaces every failure by 1."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    NOT_FINITE = 3
    STORAGE = 4
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again; the same command resumes
    INTERRUPTED = 130


def plain(text: str) -> str:
    """Return the text with terminal control characters and unencodable characters escaped, except line ends."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def on_one_line(text: str) -> str:
    """Return the text with control characters, line ends and unencodable characters escaped."""
    return plain(text).replace("\n", "\\n")


def without_password(text: str) -> str:
    """Return the text with the users, passwords and tokens of the URLs in it masked."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "***@", text)
    return re.sub(r"([?&][^=&\s]*(?:pass|secret|token|pwd)[^=&\s]*=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


class _UserError:
    """An error whose message is for the user, and its exit code."""

    exit_code: ExitCode

    def report(self) -> ExitCode:
        """Print the message to stderr, each line marked as an error, and return the exit code."""
        lines = [f"error: {line}" for line in str(self).splitlines()]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        return self.exit_code


class InputError(_UserError, ValueError):
    """The user's input cannot be used. Each line names a setting or file, its value and the remedy.

    Raised before any process group or GPU is used, except for what only shows later: ranks that differ, a checkpoint that does
    not fit, a step that cannot be captured. Ends the process with `ExitCode.BAD_INPUT`, without a traceback.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, *lines: str) -> None:
        super().__init__(plain("\n".join(lines)))
        self.lines = tuple(str(self).splitlines())  # not `lines`: unpickling passes them as one text


class NotFiniteError(_UserError, ArithmeticError):
    """The loss or a gradient became infinite or NaN; the message names the step."""

    exit_code = ExitCode.NOT_FINITE


class StorageError(_UserError, OSError):
    """The run folder cannot be written, or belongs to a newer attempt; the last good checkpoint is intact."""

    exit_code = ExitCode.STORAGE


class PeerError(_UserError, RuntimeError):
    """Another rank is missing, has failed or was lost; the message names it.

    Its exit code is that of the failed rank, if known.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def reachable_paths() -> Iterator[None]:
    """Turn an OSError that names a path into an InputError, e.g. for a folder that this user may not enter or a lost mount.

    A missing file is no such case: where one may be missing, the code says what that means.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.filename is None or isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"{error.filename}: {error.strerror}; give another path, or restore access to it") from None


def prints_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a command's `main` to print an error with an exit code of its own, and to return that code."""

    @wraps(main)
    def printing(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            with reachable_paths():
                return main(*arguments, **options)
        except (InputError, NotFiniteError, StorageError, PeerError) as error:
            return error.report()

    return printing


def first_few(names: Sequence[str], shown: int) -> str:
    """Return the first names and the number of the others, e.g. `a, b and 3 more`."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if names[shown:] else "")


def counted(count: int, noun: str, ending: str = "s") -> str:
    """Return e.g. `1 epoch` or `2 epochs`."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


@contextmanager
def reported_once(local_rank: int) -> Iterator[None]:
    """Let the first rank of a host report an InputError that all of its ranks raise, before torchrun ends them."""
    try:
        yield
    except InputError:
        if local_rank:
            time.sleep(3)
        raise
