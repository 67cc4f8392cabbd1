"""`python -m launch.slurm.requeue begin|end RUN JOB`: why each attempt of a job ended, and whether it is to be requeued.

Between the two, RUN/slurm/JOB.json holds what the next attempt must know of this one; attempts.jsonl gets a line an
attempt, beside the trainer's own, which a killed attempt has not written. Imports no torch.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.errors import ExitCode, InputError
from distributed.files import append_line, home_path, read_object, replace_json
from distributed.run.folder import RunFolder
from distributed.run.records import attempt_lines
from launch.environment import Allocation

_WILL_REPEAT = {
    ExitCode.BAD_INPUT: "bad input",
    ExitCode.NOT_FINITE: "a loss that is not finite",
    ExitCode.STORAGE: "a run folder that cannot be written or belongs to another attempt",
}


@dataclass(frozen=True)
class Decision:
    """What becomes of the job: `requeue`, `leave` (Slurm decides) or `end`, with the exit code and why."""

    verdict: str
    exit_code: int
    reason: str


def decide(
    lines: list[dict[str, Any]], *, finished: bool, saved_step: int, signal: str, restarts: int, max_requeues: int
) -> Decision:
    """The decision after an attempt.

    Args:
        lines: of attempts.jsonl, those of this attempt.
        finished: whether the run is.
        saved_step: the step of the newest checkpoint.
        signal: what the batch script was sent: USR1, Slurm's warning; TERM, by scancel or requeue; or nothing.
    """
    ended: dict[str, Any] = next(
        (line for line in reversed(lines) if line["event"] in ("finished", "stopped", "failed")), {}
    )
    started = next((line for line in reversed(lines) if line["event"] == "started"), None)
    code, said = ended.get("exit_code"), ended.get("reason", "")
    if finished:
        return Decision("end", ExitCode.FINISHED, "finished")
    if code in _WILL_REPEAT:
        return Decision("end", code, f"failed with {_WILL_REPEAT[code]}, which would repeat: {said}")
    at = f" at step {ended.get('step', saved_step)}" if started else " before it began"
    stopped = ended.get("event") == "stopped"
    if signal == "TERM":
        saved = "saved" if stopped else "ended"
        return Decision(
            "leave", ExitCode.STOPPED, f"{saved}{at} when Slurm ended the job (requeue, preemption or scancel)"
        )
    if signal:
        reason = f"{'saved' if stopped else 'ended'}{at} on Slurm's warning (SIG{signal}: time limit or preemption)"
    elif stopped:
        reason = f"saved{at} on {said}"
    elif started and saved_step > int(started.get("step") or 0):
        reason = f"failed after step {saved_step} was saved: {said or 'killed, or another process was lost'}"
    else:
        reason = f"failed without having saved anything new, which would repeat: {said or 'see the log of each node'}"
        return Decision("end", int(code or ExitCode.FAILED), reason)
    if restarts >= max_requeues:
        return Decision("end", ExitCode.STOPPED, f"{reason}; not requeued: MAX_REQUEUES = {max_requeues} is reached")
    return Decision("requeue", ExitCode.STOPPED, f"{reason}; requeue {restarts + 1} of {max_requeues}")


class Journal:
    """RUN/slurm/JOB.json: the endings so far, and where the lines of the attempt in progress begin."""

    def __init__(self, run: Path, job: str) -> None:
        self.run = RunFolder(run)
        self._file = run / "slurm" / f"{job}.json"
        self._job = job
        content = read_object(self._file)
        self._endings: list[str] = content.get("endings", [])
        self._begun: int | None = content.get("begun")

    def begin(self) -> None:
        """An attempt begins; one that has no ending was killed with its batch script."""
        if self._begun is not None:
            self._tell("lost", "lost without a word: its node was, or it was killed")
        self._write(begun=len(attempt_lines(self.run.attempts_file)))

    def end(self, signal: str, allocation: Allocation) -> Decision:
        """The decision on the attempt that just ended; it is written down."""
        newest = self.run.newest_state() or {}
        state = newest.get("state")
        step = state.get("step") if isinstance(state, dict) else None
        lines = self._lines()
        decision = decide(
            lines,
            finished=any(line["event"] == "finished" for line in lines),  # status.json may be an earlier attempt's
            saved_step=step if isinstance(step, int) else 0,
            signal=signal,
            restarts=allocation.restarts,
            max_requeues=allocation.max_requeues,
        )
        self._tell({"requeue": "requeued", "leave": "left to Slurm", "end": "ended"}[decision.verdict], decision.reason)
        self._write(begun=None)
        return decision

    @property
    def comment(self) -> str:
        """For the job: its last endings."""
        shown = list(enumerate(self._endings, start=1))[-3:]
        return " | ".join(f"attempt {number}: {reason}" for number, reason in shown)

    def _lines(self) -> list[dict[str, Any]]:
        return attempt_lines(self.run.attempts_file)[self._begun or 0 :]

    def _tell(self, event: str, reason: str) -> None:
        """Under the token of the attempt that it is about, so that readers put it with that."""
        self._endings.append(reason[:300])
        tokens = [line["token"] for line in self._lines() if "token" in line]
        line = {
            "event": event,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "token": tokens[-1] if tokens else f"{self._job}-{len(self._endings)}",
            "job": self._job,
            "reason": reason,
        }
        if event != "ended" or reason != "finished":
            append_line(self.run.attempts_file, json.dumps(line))

    def _write(self, *, begun: int | None) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self._file, {"begun": begun, "endings": self._endings})


def main() -> int:
    """To stdout, a line each: verdict, exit code, reason, comment."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.requeue", description=__doc__)
    parser.add_argument("what", choices=("begin", "end"))
    parser.add_argument("run", type=home_path, metavar="RUN")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--signal", default="", metavar="NAME", help="what the batch script was sent")
    given = parser.parse_args()
    try:
        journal = Journal(given.run, given.job)
        if given.what == "begin":
            journal.begin()
            print(journal.comment)
            return ExitCode.FINISHED
        decision = journal.end(given.signal, Allocation.from_environment())
    except InputError as error:
        error.report()
        return ExitCode.BAD_INPUT
    except OSError as error:
        print(f"error: {given.run}: {error}; the job is not requeued", file=sys.stderr)
        return ExitCode.STORAGE
    one_line = " ".join(decision.reason.split())
    print(decision.verdict, int(decision.exit_code), one_line, " ".join(journal.comment.split()), sep="\n")
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
