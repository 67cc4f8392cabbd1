"""Runs a command in a session of its own, and leaves none of its processes behind. Imports no torch."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

_LIBC = ctypes.CDLL(None)  # between fork and exec nothing should be loaded
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let SIGTERM end this process when the thread that started it ends, even by SIGKILL: a `preexec_fn`, for Linux."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))


def run_in_session(
    command: Sequence[str], seconds: float | None, *, stdout: IO[bytes], stderr: IO[bytes]
) -> int | None:
    """Run a command to its end or for at most `seconds`, and end every process it started. Call it on the main thread.

    Returns:
        The exit code; None: the time was up.
    """
    # A session of its own, so that ranks and loader workers can be ended too. A terminal that closes does not end it.
    process = subprocess.Popen(
        command, stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=end_with_parent
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its group. SIGTERM first: torchrun's ranks have sessions of their own, which only it knows."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
