"""Requests to stop: where they come from, and how all ranks agree on the step at which they do."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Protocol, Self

from distributed.collectives import LateMax
from distributed.errors import ExitCode

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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

    So does the death of a launcher: ranks whose parent was killed save and leave, instead of training on as orphans
    in the way of their successors. The handler only sets a flag; nothing is saved inside it.

    Args:
        launched: whether the parent is a launcher; a shell may end and leave its command behind (nohup).
    """

    def __init__(self, *, launched: bool) -> None:
        self._reason: str | None = None
        self._parent = os.getppid() if launched else None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason == "SIGINT":
            os._exit(ExitCode.INTERRUPTED)
        self._reason = signal.Signals(number).name

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
