"""Decides whether a Slurm job is requeued after an attempt: the first of `RULES` that applies. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from distributed.errors import ExitCode
from distributed.run.records import AttemptRecord

_PERMANENT = {
    ExitCode.BAD_INPUT: "bad input",
    ExitCode.NOT_FINITE: "a loss or gradient that is not finite",
    ExitCode.STORAGE: "a run folder that cannot be written or belongs to another attempt",
}


class Verdict(StrEnum):
    """The action on the job; the batch script reads these values."""

    REQUEUE = "requeue"
    LEAVE = "leave"
    """Slurm requeues or ends it."""
    END = "end"


@dataclass(frozen=True)
class Decision:
    """The action on the job, the job's exit code, and the reason."""

    verdict: Verdict
    exit_code: int
    reason: str


@dataclass(frozen=True)
class AttemptEnd:
    """Everything known about an attempt that has ended."""

    lines: Sequence[AttemptRecord]
    """The attempt's lines of attempts.jsonl."""
    saved_step: int
    """Step of the newest checkpoint."""
    signal: str
    """The signal that the batch script received: USR1, Slurm's warning; TERM, from scancel or requeue; or empty."""
    requeues: int
    """How often the batch script has requeued this job; those by Slurm itself do not count."""
    max_requeues: int

    @cached_property
    def _started(self) -> AttemptRecord | None:
        return self._newest("started")

    @cached_property
    def _last(self) -> AttemptRecord | None:
        """The line that records how the attempt ended; None if the trainer wrote none."""
        return self._newest("finished", "stopped", "failed")

    def _newest(self, *events: str) -> AttemptRecord | None:
        return next((line for line in reversed(self.lines) if line.event in events), None)

    @property
    def finished(self) -> bool:
        """Whether this attempt finished the run; status.json may still be an earlier attempt's."""
        return any(line.event == "finished" for line in self.lines)

    @property
    def exit_code(self) -> int | None:
        """The trainer's exit code; None if it was killed."""
        return self._last.exit_code if self._last else None

    @property
    def stopped(self) -> bool:
        """Whether the trainer saved and stopped on request."""
        return self._last is not None and self._last.event == "stopped"

    @property
    def progressed(self) -> bool:
        """Whether a checkpoint was saved after the attempt's first step."""
        return self._started is not None and self.saved_step > (self._started.step or 0)

    @property
    def trainer_reason(self) -> str:
        """The reason that the trainer recorded; empty if it was killed."""
        return (self._last and self._last.reason) or ""

    @property
    def reason_or_loss(self) -> str:
        """The trainer's reason; if it was killed, the likely cause."""
        return self.trainer_reason or "killed, or another process was lost"

    @property
    def reason_or_hint(self) -> str:
        """The trainer's reason; if it was killed, a hint where to look."""
        return self.trainer_reason or "see the log of each node"

    @property
    def permanent_failure(self) -> str:
        """The kind of failure that would repeat; empty if there is none."""
        return next((kind for code, kind in _PERMANENT.items() if code == self.exit_code), "")

    @property
    def saved_or_ended(self) -> str:
        """`saved at step N`, `ended at step N` or `ended before training started`."""
        step = self.saved_step if self._last is None or self._last.step is None else self._last.step
        when = f"at step {step}" if self._started else "before training started"
        return f"{'saved' if self.stopped else 'ended'} {when}"


class Rule(NamedTuple):
    """A condition on the attempt, and the decision if no earlier rule applies."""

    applies: Callable[[AttemptEnd], bool]
    verdict: Verdict
    exit_code: ExitCode | None
    """None: the trainer's own."""
    reason: str
    """A format string with the `AttemptEnd` as `end`."""


RULES = (
    Rule(lambda end: end.finished, Verdict.END, ExitCode.FINISHED, "finished"),
    Rule(
        lambda end: bool(end.permanent_failure), Verdict.END, None,
        "failed with {end.permanent_failure}, which would repeat: {end.trainer_reason}",
    ),
    Rule(
        lambda end: end.signal == "TERM", Verdict.LEAVE, ExitCode.STOPPED,
        "{end.saved_or_ended} when Slurm ended the job (requeue, preemption or scancel)",
    ),
    Rule(
        lambda end: bool(end.signal), Verdict.REQUEUE, ExitCode.STOPPED,
        "{end.saved_or_ended} on Slurm's warning (SIG{end.signal}: time limit or preemption)",
    ),
    Rule(lambda end: end.stopped, Verdict.REQUEUE, ExitCode.STOPPED, "{end.saved_or_ended} on {end.trainer_reason}"),
    Rule(
        lambda end: end.progressed, Verdict.REQUEUE, ExitCode.STOPPED,
        "failed after step {end.saved_step} was saved: {end.reason_or_loss}",
    ),
    Rule(
        lambda _: True, Verdict.END, None,
        "failed without saving anything new, which would repeat: {end.reason_or_hint}",
    ),
)  # fmt: skip


def decide(end: AttemptEnd) -> Decision:
    """Apply the first rule whose condition holds, then the limit on requeues."""
    rule = next(rule for rule in RULES if rule.applies(end))
    code = int(end.exit_code or ExitCode.FAILED) if rule.exit_code is None else int(rule.exit_code)
    reason = rule.reason.format(end=end)
    if rule.verdict is not Verdict.REQUEUE:
        return Decision(rule.verdict, code, reason)
    if end.requeues >= end.max_requeues:
        return Decision(Verdict.END, code, f"{reason}; not requeued: MAX_REQUEUES = {end.max_requeues} is reached")
    return Decision(Verdict.REQUEUE, code, f"{reason}; requeue {end.requeues + 1} of {end.max_requeues}")
