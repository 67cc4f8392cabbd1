"""Immediate exit from any thread, and the error file from which torchrun prints its summary. Imports no torch."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple, NoReturn

from distributed.errors import ExitCode
from distributed.process.deadline import try_within
from distributed.topology import error_file, has_launcher, is_first_on_node

_HOOK_SECONDS = 3.0  # an unresponsive run folder, store or terminal must not keep the process alive
_PRINT_SECONDS = 1.0
SAVE_SECONDS = 20.0
"""How long a rank that ends because another one failed may finish its save: torchrun and Slurm kill it after 30 seconds."""


class Exit(NamedTuple):
    """Exit code and reason of a process."""

    code: ExitCode
    reason: str
    is_local: bool = False
    """True if the other ranks are not notified. They detect the lost rank, after finishing a save in progress."""
    finishes_save: bool = False
    """True if a save in progress is finished first, within `SAVE_SECONDS`."""

    @property
    def is_stop(self) -> bool:
        """Whether the exit was requested. Every other exit is a failure."""
        return self.code in (ExitCode.STOPPED, ExitCode.INTERRUPTED)

    @property
    def status(self) -> Literal["stopped", "failed"]:
        """How the run ended, as in status.json."""
        return "stopped" if self.is_stop else "failed"


def exit_of(error: BaseException) -> Exit:
    """Return the exit that an error leads to. A stop request to another rank is an error here, and `is_stop`."""
    return Exit(getattr(error, "exit_code", ExitCode.FAILED), str(error))


ExitHook = Callable[[Exit], Exit | None]
_hooks: list[ExitHook] = []
_exiting = threading.Lock()


def add_exit_hook(hook: ExitHook, *, first: bool = False) -> None:
    """Call `hook` before an immediate exit. If it returns another exit, that one replaces the original.

    Hooks run on a separate thread, in order, and are abandoned after a few seconds, or `SAVE_SECONDS` more to finish a save.
    """
    _hooks.insert(0 if first else len(_hooks), hook)


def remove_exit_hook(hook: ExitHook) -> None:
    """Undo `add_exit_hook`."""
    _hooks.remove(hook)


def exit_now(code: ExitCode, reason: str, *, is_local: bool = False, finishes_save: bool = False) -> NoReturn:
    """Exit immediately, even if other threads are blocked. Runs the exit hooks first. Thread-safe."""
    # Never released: any other thread that calls this blocks until the process is gone. Only a second Ctrl-C does not wait; the
    # watching thread, which may find this rank's own Ctrl-C published, does.
    if not _exiting.acquire(blocking=finishes_save or code is not ExitCode.INTERRUPTED):
        os._exit(code)
    final = Exit(code, reason, is_local, finishes_save)

    def run_hooks() -> None:
        nonlocal final
        for hook in list(_hooks):
            with suppress(Exception):
                final = hook(final) or final

    try_within(_HOOK_SECONDS + (SAVE_SECONDS if finishes_save else 0), run_hooks)
    try_within(_PRINT_SECONDS, lambda: _print_reason(final))
    os._exit(final.code)


def _print_reason(final: Exit) -> None:
    write_error_file(final.reason, is_cause=False)
    with suppress(OSError, ValueError, AttributeError):  # the terminal may be gone
        if not final.is_stop or is_first_on_node() or not has_launcher():
            print(f"{'' if final.is_stop else 'error: '}{final.reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()


def write_error_file(reason: str, *, is_cause: bool) -> None:
    """Write this rank's exit reason to torchrun's error file. A no-op without torchrun.

    Args:
        is_cause: True if this rank failed on its own, False if a signal or another rank ended it.
    """
    path = error_file()
    if path is None:
        return
    # Timestamps have a resolution of one second, and torchrun reports the earliest failure as the root cause.
    timestamp = int(time.time()) + (not is_cause)
    message = {"message": reason, "extraInfo": {"timestamp": str(timestamp)}}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"message": message}), encoding="utf-8")
