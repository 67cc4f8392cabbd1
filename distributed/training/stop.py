"""Requests to stop: where they come from, and how all ranks agree on the step at which they do."""

import time
from types import TracebackType
from typing import Protocol, Self

from distributed.comm.collectives import DelayedMax


class StopSource(Protocol):
    """Where a request to stop comes from: a signal, a drain notice, a file."""

    def requested(self) -> str | None:
        """The reason in words once this rank should stop, else None. Asked after every step, so it must be cheap."""
        ...


class Never:
    """No request ever comes."""

    def requested(self) -> str | None:
        return None


class StepAgreement:
    """What all ranks do after a step: stop, save, or go on. Decided alike, one step late, at no wait. A context.

    Args:
        save_every_seconds: by rank 0's clock; 0: never.
    """

    def __init__(self, source: StopSource, *, is_main: bool, save_every_seconds: float) -> None:
        self._source, self._is_main = source, is_main
        self._save_every_seconds = save_every_seconds
        self._flags = DelayedMax(2)
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
