"""Where messages go: rank 0's to the terminal, every rank's to its own file; other libraries' logging joined in."""

import logging
import sys
from pathlib import Path
from typing import Any

from loguru import logger

from distributed.errors import plain
from distributed.files import open_regular

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
    from tqdm import tqdm  # only for its lock on the terminal: a message does not break a progress bar

    logger.remove()
    logger.configure(patcher=_escape)
    own = level if rank == 0 else "WARNING"
    logger.add(
        lambda message: tqdm.write(message, file=sys.stderr, end=""),
        level=own,
        format=_TERMINAL if rank == 0 else _TERMINAL.replace("{message}", f"[rank {rank}] {{message}}"),
        colorize=sys.stderr.isatty(),
        diagnose=False,
        backtrace=False,
    )
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def file_logs(folder: Path, rank: int) -> int:
    """Append this rank's messages to a file of its own as well; the handle is for `logger.remove`."""
    file = str(folder / f"rank-{rank:04d}.log").replace("{", "{{").replace("}", "}}")  # loguru fills in {time}
    return logger.add(file, opener=open_regular, level="DEBUG", format=_FILE, diagnose=False, backtrace=False)
