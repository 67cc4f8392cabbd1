"""Logging: rank 0 logs to the terminal, every rank to its own file. The standard library's records are included."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.errors import plain
from distributed.process.optional_output import OptionalOutput

_TERMINAL = "<green>{time:HH:mm:ss}</green> <level>{level: <7}</level> {message}"
_FILE = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {name}:{line} {message}"


class _ToLoguru(logging.Handler):
    """Forwards records of the standard library's logging to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO"
        try:
            message = f"{record.name}: {record.getMessage()}"
        except Exception:  # e.g. too few arguments: a library's mistake in a message must not end the run
            self.handleError(record)
            return
        logger.opt(depth=6, exception=record.exc_info).log(level, "{}", message)


def _escape(record: Any) -> None:
    """Strip control characters, e.g. those in file names, which could manipulate the terminal."""
    record["message"] = plain(record["message"])


def terminal_logs(rank: int, *, level: str = "INFO") -> None:
    """Log to stderr: on rank 0 from `level` up, on other ranks warnings and errors."""
    logger.remove()
    _add_terminal(rank, level)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


_replaceable = [0]
"""The id of loguru's default handler, or of the one that took its place."""


def replace_default_logs(rank: int, *, level: str) -> None:
    """Log to the terminal in place of loguru's default handler, which prints DEBUG messages, or of an earlier replacement.

    A no-op if it is gone: the program has its own.
    """
    with suppress(ValueError):
        logger.remove(_replaceable[0])
        _replaceable[0] = _add_terminal(rank, level)


def _add_terminal(rank: int, level: str) -> int:
    from tqdm import tqdm  # for its lock on the terminal, so that a message does not break a progress bar

    def write(message: str) -> None:
        with suppress(OSError, ValueError):  # a closed terminal: loguru would raise, or print a traceback
            if sys.stderr is not None:
                tqdm.write(message, file=sys.stderr, end="")

    logger.configure(patcher=_escape)
    own = level if rank == 0 else "WARNING"
    return logger.add(
        write,
        level=own,
        format=_TERMINAL if rank == 0 else _TERMINAL.replace("{message}", f"[rank {rank}] {{message}}"),
        colorize=sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty(),
        diagnose=False,
        backtrace=False,
    )


class _LogFile:
    """A log file that stops writing after its first error. Loguru's own prints a traceback per message on a full disk."""

    def __init__(self, path: Path) -> None:
        self._output = OptionalOutput(path)
        self._file: int | None = None
        self._output.run(lambda: self._open(path))

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_NONBLOCK: if the path is a pipe without a reader, opening it would block.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)

    def accepts(self, _: object) -> bool:
        """Loguru's filter: False after a failure, so that the warning about it is not written here."""
        return not self._output.failed

    def write(self, message: str) -> None:
        self._output.run(lambda: self._append(message.encode("utf-8", "backslashreplace")))

    def _append(self, line: bytes) -> None:
        while line and self._file is not None:
            line = line[os.write(self._file, line) :]

    def stop(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a file server may report a failed write only now
                os.close(self._file)
        self._file = None


def file_logs(folder: Path, rank: int) -> int:
    """Append this rank's messages to a file of its own. Return the handle for `logger.remove`."""
    file = _LogFile(folder / f"rank-{rank:04d}.log")
    return logger.add(
        file, level="DEBUG", format=_FILE, filter=file.accepts, colorize=False, diagnose=False, backtrace=False
    )
