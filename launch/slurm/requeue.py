"""`python -m launch.slurm.requeue begin|end RUN JOB`: records why each attempt of a job ended, and decides on a requeue.

RUN/slurm/JOB.json carries state from one attempt to the next. attempts.jsonl gets one line per attempt, in addition to the
trainer's own lines, since a killed trainer writes none. Imports no torch.
"""

import argparse
import json
import sys
from pathlib import Path

from distributed.errors import ExitCode, InputError, prints_errors
from distributed.files import append_line, home_path, read_object, replace_json
from distributed.run.checkpoint_layout import step_of
from distributed.run.folder import RunFolder
from distributed.run.records import AttemptRecord, read_attempts, timestamp
from launch.environment import Allocation
from launch.slurm.decision import AttemptEnd, Decision, Verdict, decide


class Journal:
    """RUN/slurm/JOB.json: how the attempts so far ended, and where the lines of the current attempt begin."""

    def __init__(self, run: Path, job: str) -> None:
        self.run = RunFolder(run)
        self._file = run / "slurm" / f"{job}.json"
        self._job = job
        content = read_object(self._file)
        self._endings: list[str] = content.get("endings", [])
        self._first_line: int | None = content.get("begun")

    def begin(self) -> None:
        """Record that an attempt begins. A previous one without an end was killed together with its batch script."""
        if self._first_line is not None:
            self._record("lost", "lost without a report: its node failed, or it was killed")
        self._write(first_line=len(read_attempts(self.run.attempts_file)))

    def end(self, signal: str, allocation: Allocation) -> Decision:
        """Decide on the attempt that just ended, and record the decision."""
        decision = decide(
            AttemptEnd(
                lines=self._lines(),
                saved_step=step_of(self.run.newest_state()) or 0,
                signal=signal,
                requeues=self._requeues(),
                max_requeues=allocation.max_requeues,
            )
        )
        event = {Verdict.REQUEUE: "requeued", Verdict.LEAVE: "left to Slurm", Verdict.END: "ended"}[decision.verdict]
        self._record(event, decision.reason)
        self._write(first_line=None)
        return decision

    @property
    def comment(self) -> str:
        """The last endings, for the job's comment."""
        last = list(enumerate(self._endings, start=1))[-3:]
        return " | ".join(f"attempt {number}: {reason}" for number, reason in last)

    def _requeues(self) -> int:
        lines = read_attempts(self.run.attempts_file)
        return sum(line.event == "requeued" and line.job == self._job for line in lines)

    def _lines(self) -> list[AttemptRecord]:
        return read_attempts(self.run.attempts_file)[self._first_line or 0 :]

    def _record(self, event: str, reason: str) -> None:
        """Append an ending, under the token of its attempt so that readers can match them."""
        self._endings.append(reason[:300])
        tokens = [line.token for line in self._lines() if line.token]
        record = AttemptRecord(
            event=event,
            time=timestamp(),
            token=tokens[-1] if tokens else f"{self._job}-{len(self._endings)}",
            job=self._job,
            reason=reason,
        )
        if event != "ended" or reason != "finished":
            append_line(self.run.attempts_file, json.dumps(record.as_json()))

    def _write(self, *, first_line: int | None) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self._file, {"begun": first_line, "endings": self._endings})


@prints_errors
def main() -> int:
    """Print verdict, exit code, reason and comment, one per line."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.requeue", description=__doc__)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run", type=home_path, metavar="RUN")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--signal", default="", metavar="NAME", help="the signal that the batch script received")
    options = parser.parse_args()
    try:
        journal = Journal(options.run, options.job)
        if options.moment == "begin":
            journal.begin()
            print(journal.comment)
            return ExitCode.FINISHED
        decision = journal.end(options.signal, Allocation.from_environment())
    except (OSError, InputError) as error:
        consequence = "the job goes on" if options.moment == "begin" else "the job is not requeued"
        print(f"error: {options.run}: {error}; {consequence}", file=sys.stderr)
        return ExitCode.STORAGE
    reason, comment = (" ".join(text.split()) for text in (decision.reason, journal.comment))
    print(decision.verdict, decision.exit_code, reason, comment, sep="\n")
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
