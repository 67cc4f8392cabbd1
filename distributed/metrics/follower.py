"""Copies metrics.jsonl to a service such as MLflow, on a thread of its own, so that training never waits for the service.

The file is the queue: it has every line before a sink is called, however long the service is away, and on a resume also
the lines that a killed attempt did not get through. What the service has already is not sent again.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, TypeGuard

from loguru import logger

from distributed.errors import without_password
from distributed.metrics.records import EpochMetrics, TrainMetrics
from distributed.process import exits
from distributed.process.optional_output import one_line
from distributed.run.metrics_file import EpochRecord, MetricsRecord, parse_metrics

Status = Literal["finished", "stopped", "failed"]

CLOSE_SECONDS: dict[Status, float] = {"finished": 20.0, "stopped": 5.0, "failed": 5.0}
"""How long a run waits at its end for the service to take the last lines. A stopped one may be killed soon."""
RETRY_SECONDS = 10.0
_EXIT_SECONDS = 1.5  # of the few that an immediate exit has
_LINES_AT_ONCE = 50


class Logged(NamedTuple):
    """What a service has of a run: the last logged step, and the number of epochs."""

    step: int = 0
    epochs: int = 0

    def has(self, record: MetricsRecord) -> bool:
        """Whether the service has this line, e.g. from an attempt that was killed before it could save."""
        return record.epoch < self.epochs if isinstance(record, EpochRecord) else record.step <= self.step


class RefusedError(Exception):
    """A service will not take this run's metrics, and another try would change nothing. The message names what remains."""


class Service(Protocol):
    """A place on the network or on disk that keeps runs. Its methods may wait or raise; each may be called again then."""

    def start(self) -> Logged:
        """Create the run there, or continue it, and return what the service has of it."""
        ...

    def log(self, records: Sequence[MetricsRecord]) -> None:
        """Log lines of metrics.jsonl, in their order."""
        ...

    def finish(self, status: Status) -> None:
        """Record how the run ended."""
        ...


class Follower:
    """A `Sink` that copies metrics.jsonl to a service. A failure is logged once and tried again later."""

    def __init__(self, name: str, file: Path, make: Callable[[], Service]) -> None:
        self.name = name
        self._make = make
        self._file: BinaryIO = file.open("rb")  # keeps reading this attempt's file if another attempt replaces it
        self._service: Service | None = None
        self._logged = Logged()
        self._deadline = 0.0  # of the waiting at the end
        self._status: Status = "failed"  # unless `end` is called
        self._wake, self._closing, self._warned = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        exits.add_exit_hook(self._exit)
        self._thread.start()

    def log_step(self, metrics: TrainMetrics) -> None:
        self._wake.set()

    def log_epoch(self, metrics: EpochMetrics) -> None:
        self._wake.set()

    def end(self, status: Status) -> None:
        """Send the rest, and wait for it in `close`, so that several services take the time of one."""
        self._begin_ending(status, CLOSE_SECONDS[status])

    def close(self) -> None:
        exits.remove_exit_hook(self._exit)
        if not self._closing:
            self._begin_ending(self._status, CLOSE_SECONDS[self._status])
        self._wait_for_end(CLOSE_SECONDS[self._status])

    def _exit(self, ending: exits.Exit) -> None:
        self._begin_ending(ending.status, _EXIT_SECONDS)
        self._wait_for_end(_EXIT_SECONDS)

    def _begin_ending(self, status: Status, seconds: float) -> None:
        self._status, self._deadline, self._closing = status, time.monotonic() + seconds, True
        self._wake.set()

    def _wait_for_end(self, seconds: float) -> None:
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"no answer within {seconds:g} s at the end of the run; metrics.jsonl has the rest")

    def _run(self) -> None:
        while True:
            closing = self._closing  # before the lines are read, so that none is left behind
            try:
                self._copy()
                if closing and self._service:
                    self._service.finish(self._status)
            except RefusedError as error:
                self._warn(str(error))
                break
            except (Exception, SystemExit) as error:  # wandb exits if its service has died
                remedy = "metrics.jsonl has the rest" if closing else "training continues, and it is tried again"
                self._warn(f"{one_line(error)}; {remedy}")
                if not closing:
                    self._pause()
                    continue
            if closing:
                break
            self._wake.wait()
            self._wake.clear()
        self._file.close()

    def _copy(self) -> None:
        """Send the lines that are new. If that fails, the next call sends them again."""
        if self._service is None:
            service = self._make()
            self._logged = service.start()
            self._service = service
        while True:
            position = self._file.tell()
            lines = [line for line in islice(self._file, _LINES_AT_ONCE) if line.endswith(b"\n")]
            self._file.seek(position + sum(map(len, lines)))  # not behind a line that is still being written
            if not lines:
                return
            records = [record for line in lines if (record := parse_metrics(line)) and not self._logged.has(record)]
            try:
                if records:
                    self._service.log(records)
            except BaseException:
                self._file.seek(position)
                raise

    def _pause(self) -> None:
        deadline = time.monotonic() + RETRY_SECONDS
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _warn(self, reason: str) -> None:
        """Warn once; further failures are in the log file only."""
        logger.log("DEBUG" if self._warned else "WARNING", "{}: {}", self.name, without_password(reason))
        self._warned = True


def values_of(record: MetricsRecord) -> dict[str, float]:
    """Return a line's metrics by name, e.g. `train/loss` and `validation/accuracy`, without those that are not finite."""
    fields = record.model_dump(
        exclude={"kind", "data", "epoch", "step", "is_best", "validation", "test", "eta_seconds"}
    )
    if not isinstance(record, EpochRecord):
        return _numbers("train", fields)
    found = {"epoch": float(record.epoch + 1)} | _numbers("epoch", fields)
    for name, split in (("validation", record.validation), ("test", record.test)):
        found |= _numbers(name, split.model_dump()) if split else {}
    return found


def _numbers(prefix: str, fields: dict[str, object]) -> dict[str, float]:
    found = {f"{prefix}/{name}": float(value) for name, value in fields.items() if _is_finite(value)}
    for nested in fields.values():
        found |= _numbers(prefix, nested) if isinstance(nested, dict) else {}
    return found


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
