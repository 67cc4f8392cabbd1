"""Ends a command on Ctrl-C without a traceback while it imports its modules, which can take seconds. Imports no torch."""

import os
import signal
import sys
import threading
from itertools import pairwise
from types import FrameType

from distributed.errors import ExitCode
from distributed.name_clash import starts_command

_PACKAGES = ("distributed", "launch")


def exit_on_interrupt() -> None:
    """Exit with code 130 on SIGINT until `raise_on_interrupt` is called, if this process is starting a command."""
    # It may be ignored, e.g. by `&` in a script.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default and threading.current_thread() is threading.main_thread() and _starts_command():
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Let SIGINT raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _starts_command() -> bool:
    is_own = any(a == "-m" and b.partition(".")[0] in _PACKAGES for a, b in pairwise(sys.orig_argv))
    return starts_command() and (is_own or sys.argv[:1] != ["-m"])


def _exit(_: int, __: FrameType | None) -> None:
    os._exit(ExitCode.INTERRUPTED)
