"""Requests to stop: where they come from, and how all ranks agree on the step at which they do."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Protocol, Self

from distributed.collectives import LateMax
from distributed.errors import ExitCode

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_DEAF_SECONDS = 5.0
_TWICE_SECONDS = 0.5  # launchers, Slurm and `timeout` may send one signal twice at once


class StopSource(Protocol):
    """Where a request to stop comes from: a signal, a drain notice, a file."""

    def requested(self) -> str | None:
        """The reason in words once this rank should stop, else None. Asked after every step, so it must be cheap."""
        ...


class Never:
    """No request ever comes."""

    def requested(self) -> str | None:
        return None


class SignalStop:
    """SIGTERM, SIGINT and SIGUSR1 ask to stop at the next step; a second SIGINT ends the process at once.

    So does a second SIGTERM some seconds later if no step has finished in between. A thread that waits for a GPU whose
    peers are gone runs no Python handlers, so a separate thread reads the pipe that the C handler writes to.

    The death of a launcher asks to stop too: ranks whose parent was killed save and leave, instead of training on as
    orphans in the way of their successors. Nothing is saved inside a handler.

    Args:
        launched: whether the parent is a launcher; a shell may end and leave its command behind (nohup).
    """

    def __init__(self, *, launched: bool) -> None:
        self._reason: str | None = None
        self._handled_at = 0.0
        self._parent = os.getppid() if launched else None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
            while numbers := pipe.read(1):
                number, now = numbers[0], time.monotonic()
                since_first = now - first.setdefault(number, now)
                if number == signal.SIGINT and since_first > _TWICE_SECONDS:
                    os._exit(ExitCode.INTERRUPTED)
                if number == signal.SIGTERM and since_first > _DEAF_SECONDS and self._is_deaf_to(now):
                    with suppress(OSError):  # the launcher may have closed it
                        print(
                            "error: terminated by a second SIGTERM: no answer to the first", file=sys.stderr, flush=True
                        )
                    os._exit(ExitCode.FAILED)

    def _is_deaf_to(self, signalled_at: float) -> bool:
        """Whether the main thread has not run its handler some seconds after a signal, nor just before that."""
        while time.monotonic() - signalled_at < _DEAF_SECONDS:
            if self._handled_at > signalled_at - 1.0:
                return False
            time.sleep(0.05)
        return True

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._reason, self._handled_at = signal.Signals(number).name, time.monotonic()

    def requested(self) -> str | None:
        if self._reason is None and self._parent not in (None, os.getppid()):
            self._reason = "the launcher's death"
        return self._reason


class StepAgreement:
    """What all ranks do after a step: stop, save, or go on. Decided alike, one step late, at no wait. A context.

    Args:
        save_every_seconds: by rank 0's clock; 0: never.
    """

    def __init__(self, source: StopSource, *, is_main: bool, save_every_seconds: float) -> None:
        self._source, self._is_main = source, is_main
        self._save_every_seconds = save_every_seconds
        self._flags = LateMax(2)
        self._saved_at = time.monotonic()
        self.reason: str | None = None

    def after_step(self) -> tuple[bool, bool]:
        """(stop now, save now); a collective."""
        late = time.monotonic() - self._saved_at > self._save_every_seconds
        due = bool(self._save_every_seconds) and self._is_main and late
        if due:
            self.saved()
        return self._decided(self._flags.exchange(self._source.requested() is not None, due))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:
            self._flags.drain()  # what was handed in last, where no step follows; not with peers in an unknown state

    def saved(self) -> None:
        """A checkpoint was made; the clock starts anew."""
        self._saved_at = time.monotonic()

    def _decided(self, flags: list[int]) -> tuple[bool, bool]:
        stop, save = flags
        if stop:
            self.reason = self._source.requested() or "a request to another rank"
        return bool(stop), bool(save)
