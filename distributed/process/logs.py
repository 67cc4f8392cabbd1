"""Where messages go: rank 0's to the terminal, every rank's to its own file; other libraries' logging joined in."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.errors import plain
from distributed.process.byproducts import Byproduct

_TERMINAL = "<green>{time:HH:mm:ss}</green> <level>{level: <7}</level> {message}"
_FILE = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {name}:{line} {message}"


class _ToLoguru(logging.Handler):
    """Hands records of the standard library's logging to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO"
        logger.opt(depth=6, exception=record.exc_info).log(level, "{}", f"{record.name}: {record.getMessage()}")


def _escape(record: Any) -> None:
    """Keep names of files and other input from steering the terminal."""
    record["message"] = plain(record["message"])


def terminal_logs(rank: int, *, level: str = "INFO") -> None:
    """Send rank 0's messages of `level` and up, and other ranks' warnings, to stderr."""
    logger.remove()
    _add_terminal(rank, level)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def replace_default_logs(rank: int, *, level: str) -> None:
    """As `terminal_logs`, for a program that has not configured loguru, whose default prints DEBUG messages, or logging."""
    with suppress(ValueError):  # the default handler has been removed: the program has its own
        logger.remove(0)
        _add_terminal(rank, level)


def _add_terminal(rank: int, level: str) -> None:
    from tqdm import tqdm  # only for its lock on the terminal: a message does not break a progress bar

    def say(message: str) -> None:
        with suppress(OSError, ValueError):  # a closed terminal; loguru would raise, or print a traceback into it
            if sys.stderr is not None:
                tqdm.write(message, file=sys.stderr, end="")

    logger.configure(patcher=_escape)
    own = level if rank == 0 else "WARNING"
    logger.add(
        say,
        level=own,
        format=_TERMINAL if rank == 0 else _TERMINAL.replace("{message}", f"[rank {rank}] {{message}}"),
        colorize=sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty(),
        diagnose=False,
        backtrace=False,
    )


class _LogFile:
    """A log file up to its first error. Loguru's own prints a traceback for every message on a full disk."""

    def __init__(self, path: Path) -> None:
        self._byproduct = Byproduct(path)
        self._file: int | None = None
        self._byproduct.attempt(lambda: self._open(path))

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without waiting: a pipe in the file's place has perhaps no reader.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)

    def takes(self, _: object) -> bool:
        """Whether it still writes: loguru's filter, so that the warning of its failure does not come here."""
        return not self._byproduct.failed

    def write(self, message: str) -> None:
        self._byproduct.attempt(lambda: self._append(message.encode("utf-8", "backslashreplace")))

    def _append(self, line: bytes) -> None:
        while line and self._file is not None:
            line = line[os.write(self._file, line) :]

    def stop(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a file server reports here what it could not store
                os.close(self._file)
        self._file = None


def file_logs(folder: Path, rank: int) -> int:
    """Append this rank's messages to a file of its own as well; the handle is for `logger.remove`."""
    file = _LogFile(folder / f"rank-{rank:04d}.log")
    return logger.add(
        file, level="DEBUG", format=_FILE, filter=file.takes, colorize=False, diagnose=False, backtrace=False
    )
