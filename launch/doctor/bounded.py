"""Runs a command that may hang or fail. Imports no torch."""

import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, NamedTuple

from distributed.errors import InputError


class Finished(NamedTuple):
    """The stdout of a command, and a line on why it failed; empty if it did not."""

    printed: str
    problem: str


def run_bounded(command: Sequence[str], seconds: float) -> Finished:
    """Run a command, and end it if it is still running after `seconds`.

    Raises:
        InputError: it cannot be started.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:  # a child could keep a pipe open
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        except OSError as error:
            raise InputError(f"{command[0]}: {error.strerror}; start this on a node of the job, which has it") from None
        try:
            timed_out = not _wait_or_end(process, seconds)
        except BaseException:  # SIGTERM or Ctrl-C
            process.terminate()
            raise
        printed, complaints = _text(out), _text(errors)
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    reason = next((line for mark in (" failed on node ", "error:", "") for line in lines if mark in line), "")[:300]
    if timed_out:
        return Finished(printed, f"still running after {seconds:g} s{f': {reason}' if reason else ''}")
    return Finished(printed, (reason or f"exit code {process.returncode}") if process.returncode else "")


def _wait_or_end(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Return whether the process ended in time; otherwise end it, first by SIGTERM, on which srun ends its tasks."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
