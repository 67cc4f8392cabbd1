"""Start and end of a command. A closed or full stream stops the output, not the command. Imports no torch."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from distributed.errors import ExitCode


class _Forgiving(io.FileIO):
    """A standard stream that turns into /dev/null once it cannot be written."""

    def write(self, content: Any, /) -> int:
        try:
            while (written := super().write(content)) is None:  # another process has made the terminal non-blocking
                select.select([], [self], [])
            return written
        except OSError:
            _replace(self.fileno(), os.O_WRONLY)  # for libraries that write to the descriptor, too
            return len(memoryview(content))


def run_command(main: Callable[[], int], *, at_once: bool = False) -> NoReturn:
    """End the process with the exit code that `main` returns, or 130 after Ctrl-C.

    Args:
        at_once: without the handlers that run at exit, and without waiting for threads.
    """
    outlive_streams()
    try:
        code = main()
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once:
        os._exit(code)
    sys.exit(code)


def outlive_streams() -> None:
    """Let no failure to print reach the code of this process; a stream that is closed becomes /dev/null."""
    for handle in (0, 1, 2):  # else a file that is opened later takes the number, and prints go into it
        try:
            os.fstat(handle)
        except OSError:
            _replace(handle, os.O_RDWR)
    sys.stdout, sys.stderr = _writer(1, sys.stdout), _writer(2, sys.stderr)


def _replace(handle: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    if null == handle:
        os.set_inheritable(handle, True)
    else:
        os.dup2(null, handle)
        os.close(null)


def _writer(handle: int, before: Any) -> io.TextIOWrapper:
    raw = io.BufferedWriter(_Forgiving(handle, "w", closefd=False))
    return io.TextIOWrapper(raw, getattr(before, "encoding", "utf-8"), errors="backslashreplace", line_buffering=True)
