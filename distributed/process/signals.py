"""Signals: they end the process at once until there is something to save, and ask to stop from then on. Imports no torch."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from distributed.errors import ExitCode
from distributed.process.endings import leave

_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # ignored at the start, by nohup or a script's `&`, they stay so
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, *_OF_THE_TERMINAL)
_DEAF_SECONDS = 5.0
_TWICE_SECONDS = 0.5  # launchers, Slurm and `timeout` may send one signal twice at once
_LOOK_SECONDS = 0.5
_ORPHANED = "the launcher's death"


class SignalStop:
    """A `StopSource`: SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask to stop at the next step. A context, of the main thread.

    A second SIGINT ends the process at once. So does a second SIGTERM some seconds later if no step has finished in
    between. A thread that waits for a peer in C++ runs no Python handlers, so a separate thread reads the pipe that the C
    handler writes to.

    The launcher's death asks to stop too: ranks whose parent was killed save and leave, instead of training on as
    orphans that block their successors. Nothing is saved inside a handler.

    Args:
        launched: whether the parent is a launcher; a shell may end and leave its command behind (nohup).
        at_once_until_asked: end the process at the first signal until `requested` was called, i.e. until the first step
            of training is done: before it there is nothing to save, and a rank may wait for its peers.
    """

    def __init__(self, *, launched: bool, at_once_until_asked: bool = False) -> None:
        self._reason: str | None = None
        self._handled_at = 0.0
        self._parent = os.getppid() if launched else None
        self._at_once = at_once_until_asked

    def __enter__(self) -> Self:
        self._terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        for number in _SIGNALS:
            if number not in _OF_THE_TERMINAL or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # the thread reads the end
        self._thread.join()

    def _listen(self, read: int) -> None:
        first: dict[int, float] = {}
        with open(read, "rb", buffering=0) as pipe:
            while True:
                # Once steps are taken, `requested` looks after the parent.
                if not select.select([pipe], [], [], _LOOK_SECONDS if self._at_once else None)[0]:
                    if self._at_once and self._is_orphan():
                        leave(ExitCode.STOPPED, f"stopped by {_ORPHANED} before the first step; nothing to save")
                    continue
                if not (numbers := pipe.read(1)):
                    return
                number, now = numbers[0], time.monotonic()
                if number in self._before:
                    self._heard(number, now, now - first.setdefault(number, now))

    def _heard(self, number: int, now: float, since_first: float) -> None:
        if self._at_once:
            code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.STOPPED
            leave(code, f"stopped by {signal.Signals(number).name} before the first step; nothing to save")
        if number == signal.SIGINT and since_first > _TWICE_SECONDS:
            leave(ExitCode.INTERRUPTED, "ended by a second SIGINT; the same command resumes from the last checkpoint")
        if number == signal.SIGTERM and since_first > _DEAF_SECONDS and self._is_deaf_to(now):
            leave(ExitCode.FAILED, "terminated by a second SIGTERM: no answer to the first", is_alone=True)

    def _is_deaf_to(self, signalled_at: float) -> bool:
        """Whether the main thread has not run its handler some seconds after a signal, nor just before that."""
        while time.monotonic() - signalled_at < _DEAF_SECONDS:
            if self._handled_at > signalled_at - 1.0:
                return False
            time.sleep(0.05)
        return True

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._reason, self._handled_at = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGHUP:
            self._let_go_of_the_terminal()

    def _let_go_of_the_terminal(self) -> None:
        """A write to a terminal that was closed is an error, and would end the run before it has saved."""
        for fd in self._terminals:
            if not os.isatty(fd):
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, fd)
                os.close(null)

    def _is_orphan(self) -> bool:
        return self._parent not in (None, os.getppid())

    def requested(self) -> str | None:
        self._at_once = False
        if self._reason is None and self._is_orphan():
            self._reason = _ORPHANED
        return self._reason
