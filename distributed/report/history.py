"""The history of a run, read from its folder: metrics, attempts and status. Imports no torch."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from distributed.config import TrainConfig
from distributed.figures.curves import NamedLog
from distributed.inference.saved_run import read_config
from distributed.run.folder import RunFolder
from distributed.run.metrics_log import MetricsLog
from distributed.run.records import AttemptRecord, Status, read_attempts


@dataclass(frozen=True)
class Attempt:
    """One attempt: its lines of attempts.jsonl. `ended` is None while it runs, and if it was killed."""

    started: AttemptRecord
    ended: AttemptRecord | None

    @property
    def duration(self) -> timedelta | None:
        """None if the end was not recorded, or only later by a requeued job, or is before the start: a clock was set."""
        if self.ended is None or self.ended.event == "lost":
            return None
        duration = self.ended.moment - self.started.moment
        return duration if duration >= timedelta() else None

    @property
    def hardware(self) -> str:
        """Describe processes, threads and device as far as recorded, e.g. `2 processes × 1 thread, AMD EPYC`."""
        if self.started.event != "started":
            return "ended before training started"
        bits = self.started.bits or {}
        processes, threads = self.started.world_size or 1, bits.get("threads")
        text = f"{processes} process{'es' if processes > 1 else ''}"
        if threads:
            text += f" × {threads} thread{'s' if threads > 1 else ''}"
        return f"{text}, {bits['device']}" if bits.get("device") else text


@dataclass(frozen=True)
class WallTime:
    """The total duration of a run's attempts; not `complete` if one of them recorded no end."""

    total: timedelta
    complete: bool


@dataclass(frozen=True)
class History:
    """Everything that a run recorded, except its checkpoints."""

    name: str
    folder: RunFolder
    config: TrainConfig
    status: Status
    attempts: list[Attempt]
    log: MetricsLog

    @property
    def progress(self) -> str:
        """Format finished and planned epochs, e.g. `3 of 10 epochs`."""
        return f"{self.log.finished_epochs} of {self.config.epochs} epochs"

    @property
    def started_attempts(self) -> list[Attempt]:
        """The attempts that started training; others were refused."""
        return [attempt for attempt in self.attempts if attempt.started.event == "started"]

    @property
    def wall_time(self) -> WallTime:
        durations = [attempt.duration for attempt in self.attempts]
        return WallTime(sum((d for d in durations if d), timedelta()), None not in durations)

    @property
    def to_draw(self) -> NamedLog:
        return NamedLog(self.name, self.log, plateau=self.config.schedule.name == "plateau")


def read_history(run: Path) -> History:
    """Read a run folder; the run may still be in progress.

    Raises:
        InputError: not a run folder.
    """
    folder, config = RunFolder(run), read_config(run)
    return History(
        run.resolve().name,
        folder,
        config,
        folder.status(),
        _attempts([line for line in read_attempts(folder.attempts_file) if line.time]),
        MetricsLog.read(folder.metrics_file).without_gaps(),
    )


def _attempts(lines: list[AttemptRecord]) -> list[Attempt]:
    """Pair each start with the end of the same token. An attempt that failed before starting has its end as its start."""
    # The trainer's own end counts, not what a requeued job found: its batch script may have been killed afterwards.
    ends = {
        line.token: line for line in sorted(lines, key=lambda line: line.event != "lost") if line.event != "started"
    }
    starts = {line.token: line for line in reversed(lines) if line.event == "started"}
    tokens = dict.fromkeys(line.token for line in lines)
    return [Attempt(starts.get(token) or ends[token], ends.get(token)) for token in tokens]
