"""Entry and exit of a command. A closed or full output stream ends the output, not the command. Imports no torch."""

import faulthandler
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from distributed.errors import ExitCode
from distributed.process import early_interrupt


class _TolerantStream(io.FileIO):
    """A standard stream that becomes /dev/null when a write fails."""

    def write(self, content: Any, /) -> int:
        try:
            while (written := super().write(content)) is None:  # another process has made the terminal non-blocking
                select.select([], [self], [])
            return written
        except OSError:
            _replace(self.fileno(), os.O_WRONLY)  # also for libraries that write to the descriptor directly
            return len(memoryview(content))


def run_command(main: Callable[[], int], *, skip_cleanup: bool = False, starts_processes: bool = False) -> NoReturn:
    """Exit the process with the code returned by `main`, or with 130 after Ctrl-C.

    After a crash in C code (SIGSEGV, SIGABRT, SIGBUS) the Python stack of every thread is on stderr.

    Args:
        skip_cleanup: exit without running atexit handlers and without waiting for other threads.
        starts_processes: on SIGTERM, SIGUSR1 or SIGHUP raise SystemExit, so that `main` can end the processes it has started;
            nohup's SIGHUP stays ignored.
    """
    protect_streams()
    faulthandler.enable()
    if starts_processes:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # SIGUSR1: Slurm's warning before a time limit
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        early_interrupt.raise_on_interrupt()
        code = main()
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    if skip_cleanup:
        os._exit(code)
    sys.exit(code)


def protect_streams() -> None:
    """Make the standard streams ignore write errors. A closed stream becomes /dev/null."""
    for handle in (0, 1, 2):  # otherwise the next file opened takes the number, and receives what is printed
        try:
            os.fstat(handle)
        except OSError:
            _replace(handle, os.O_RDWR)
    sys.stdout, sys.stderr = _writer(1, sys.stdout), _writer(2, sys.stderr)


def _replace(handle: int, flags: int) -> None:
    """Open /dev/null under this descriptor."""
    null = os.open(os.devnull, flags)
    if null == handle:
        os.set_inheritable(handle, True)
    else:
        os.dup2(null, handle)
        os.close(null)


def _writer(handle: int, before: Any) -> io.TextIOWrapper:
    raw = io.BufferedWriter(_TolerantStream(handle, "w", closefd=False))
    return io.TextIOWrapper(raw, getattr(before, "encoding", "utf-8"), errors="backslashreplace", line_buffering=True)
