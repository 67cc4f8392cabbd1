"""Stop requests: where they come from, and how all ranks agree on the step at which to stop."""

import time
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from distributed.comm.collectives import gather_objects
from distributed.comm.delayed_max import open_delayed_max


class StopSource(Protocol):
    """A source of stop requests, e.g. a signal, a drain notice or a file."""

    def requested(self) -> str | None:
        """Return the reason if this rank should stop, else None. Called after every step, so it must be cheap."""
        ...


class NeverStop:
    """A `StopSource` without requests."""

    def requested(self) -> str | None:
        return None


class Decision(NamedTuple):
    """What all ranks do after a step."""

    stop: bool
    save: bool


class StepAgreement:
    """Lets all ranks reach the same decision after each step, one step late, without blocking. Context manager.

    Args:
        save_every_seconds: time between saves by rank 0's clock; 0: never.
        timeout_seconds: how long to wait for another rank.
    """

    def __init__(self, source: StopSource, *, is_main: bool, save_every_seconds: float, timeout_seconds: float) -> None:
        self._source, self._is_main = source, is_main
        self._save_every_seconds = save_every_seconds
        self._flags = open_delayed_max(2, timeout_seconds=timeout_seconds)
        self._saved_at = time.monotonic()
        self.reason: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is None:  # completes the last exchange; after an error the peers may never answer
            self._flags.drain()

    def after_step(self) -> Decision:
        """Exchange this step's requests and return the decision on the previous step's. A collective."""
        elapsed = time.monotonic() - self._saved_at
        save_due = self._is_main and 0 < self._save_every_seconds < elapsed
        if save_due:
            self.restart_save_timer()
        stop, save = self._flags.exchange(self._source.requested() is not None, save_due)
        if stop:
            # Ranks may hear of a request at different steps: record the reason of the lowest rank that knows one by now.
            self.reason = next(
                (reason for reason in gather_objects(self._source.requested()) if reason), "a stop request"
            )
        return Decision(bool(stop), bool(save))

    def restart_save_timer(self) -> None:
        """Start counting `save_every_seconds` anew after a save."""
        self._saved_at = time.monotonic()
