"""Signal handling: exit immediately while there is nothing to save, then request a stop. Imports no torch."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from distributed.errors import ExitCode
from distributed.process.exits import exit_now

_TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # stay ignored if they were at the start (nohup, `&` in a script)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, *_TERMINAL_SIGNALS)
_UNRESPONSIVE_SECONDS = 5.0
_DUPLICATE_SECONDS = 0.5  # launchers, Slurm and `timeout` may send the same signal twice
_POLL_SECONDS = 0.5
_ORPHANED = "the launcher's death"


class SignalStop:
    """A `StopSource`: SIGTERM, SIGINT, SIGUSR1 and SIGHUP request a stop at the next step. Context manager.

    A second SIGINT exits immediately. So does a second SIGTERM, five seconds or more after the first, if the
    main thread does not respond: while it waits for a peer in C++ it runs no Python signal handlers, so a separate
    thread reads the pipe that the C-level handler writes to.

    The launcher's death requests a stop as well: orphaned ranks save and exit, so that they do not block their
    successors. Nothing is saved inside a handler. Must be entered on the main thread.

    Args:
        launched: True if the parent process is a launcher. A shell may exit and leave its command running (nohup).
        exit_before_first_step: exit immediately on a signal until `requested` is first called, i.e. until the first
            training step is done. Until then there is nothing to save, and the rank may be waiting for its peers.
        holds_sigterm: do not exit on SIGTERM until `release_sigterm` is called. A signal mask would not suffice: threads that
            libraries started earlier, e.g. those of NumPy's BLAS, would take the signal.
    """

    def __init__(self, *, launched: bool, exit_before_first_step: bool = False, holds_sigterm: bool = False) -> None:
        self._reason: str | None = None
        self._handled_at = 0.0
        self._parent = os.getppid() if launched else None
        self._exits_immediately = exit_before_first_step
        self._sigterm_released = threading.Event()
        if not holds_sigterm:
            self._sigterm_released.set()

    def __enter__(self) -> Self:
        self._terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        for number in _SIGNALS:
            if number not in _TERMINAL_SIGNALS or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._exits_immediately = False  # the process is ending by itself
        self._sigterm_released.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed by C code
        os.close(self._write)  # the thread reads end-of-file and returns
        self._thread.join()

    def requested(self) -> str | None:
        self._exits_immediately = False
        if self._reason is None and self._is_orphan():
            self._reason = _ORPHANED
        return self._reason

    def release_sigterm(self) -> None:
        """Handle SIGTERM from now on, and one that has arrived before."""
        self._sigterm_released.set()

    def _listen(self, read: int) -> None:
        first: dict[int, float] = {}
        with open(read, "rb", buffering=0) as pipe:
            while True:
                # After the first step `requested` checks for the launcher's death, so no polling is needed.
                if not select.select([pipe], [], [], _POLL_SECONDS if self._exits_immediately else None)[0]:
                    if self._exits_immediately and self._is_orphan():
                        exit_now(ExitCode.STOPPED, f"stopped by {_ORPHANED} before the first step; nothing to save")
                    continue
                if not (numbers := pipe.read(1)):
                    return
                number = numbers[0]
                if number == signal.SIGTERM:
                    self._sigterm_released.wait()
                now = time.monotonic()
                if number in self._previous:
                    self._on_signal(number, now, now - first.setdefault(number, now))

    def _on_signal(self, number: int, now: float, since_first: float) -> None:
        if self._exits_immediately:
            code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.STOPPED
            exit_now(code, f"stopped by {signal.Signals(number).name} before the first step; nothing to save")
        if number == signal.SIGINT and since_first > _DUPLICATE_SECONDS:
            exit_now(
                ExitCode.INTERRUPTED, "ended by a second SIGINT; the same command resumes from the last checkpoint"
            )
        if number == signal.SIGTERM and since_first > _UNRESPONSIVE_SECONDS and self._is_unresponsive(now):
            exit_now(ExitCode.FAILED, "terminated by a second SIGTERM: no answer to the first", is_local=True)

    def _is_unresponsive(self, signalled_at: float) -> bool:
        """Whether the main thread has run no handler from shortly before the signal until some seconds after it."""
        while time.monotonic() - signalled_at < _UNRESPONSIVE_SECONDS:
            if self._handled_at > signalled_at - 1.0:
                return False
            time.sleep(0.05)
        return True

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._reason, self._handled_at = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGHUP:
            self._detach_closed_terminals()

    def _detach_closed_terminals(self) -> None:
        """Replace closed terminals by /dev/null. A write to one would raise, and end the run before it has saved."""
        for fd in self._terminals:
            if not os.isatty(fd):
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, fd)
                os.close(null)

    def _is_orphan(self) -> bool:
        return self._parent not in (None, os.getppid())
