"""Whether an attempt of a Slurm job is requeued, and what the journal records."""

from pathlib import Path
from typing import Any

import pytest

from distributed.errors import ExitCode
from distributed.run.records import AttemptRecord
from launch.environment import Allocation, fewest_cpus
from launch.slurm.decision import AttemptEnd, Decision, decide
from launch.slurm.requeue import Journal

STARTED = {"event": "started", "step": 10, "token": "a"}
STOPPED = {"event": "stopped", "exit_code": 75, "step": 14, "reason": "SIGUSR1"}
FINISHED = {"event": "finished", "exit_code": 0, "step": 20}


def decided(*lines: dict[str, Any], saved: int = 10, signal: str = "", requeues: int = 0) -> Decision:
    records = [AttemptRecord.model_validate(line) for line in lines]
    return decide(AttemptEnd(records, saved_step=saved, signal=signal, requeues=requeues, max_requeues=3))


@pytest.mark.parametrize(
    ("lines", "saved", "signal", "reason"),
    [
        ([STARTED, STOPPED], 14, "USR1", "saved at step 14 on Slurm's warning (SIGUSR1: time limit or preemption)"),
        ([STARTED, STOPPED], 14, "", "saved at step 14 on SIGUSR1"),
        ([], 10, "USR1", "ended before training started on Slurm's warning (SIGUSR1: time limit or preemption)"),
        ([STARTED], 15, "", "failed after step 15 was saved: killed, or another process was lost"),
    ],
)
def test_an_attempt_that_can_succeed_is_requeued(lines: list[dict[str, Any]], saved: int, signal: str, reason: str):
    decision = decided(*lines, saved=saved, signal=signal)
    assert decision == Decision("requeue", ExitCode.STOPPED, f"{reason}; requeue 1 of 3")


def test_the_number_of_requeues_is_limited():
    decision = decided(STARTED, STOPPED, signal="USR1", requeues=3)
    assert (decision.verdict, decision.exit_code) == ("end", ExitCode.STOPPED)
    assert "not requeued: MAX_REQUEUES = 3 is reached" in decision.reason


@pytest.mark.parametrize("code", [ExitCode.BAD_INPUT, ExitCode.NOT_FINITE, ExitCode.STORAGE])
def test_a_failure_that_would_repeat_ends_the_job(code: ExitCode):
    decision = decided(STARTED, {"event": "failed", "exit_code": int(code), "reason": "why"}, saved=99, signal="USR1")
    assert (decision.verdict, decision.exit_code) == ("end", code)
    assert decision.reason.endswith("which would repeat: why")


@pytest.mark.parametrize("lines", [[STARTED], []])
def test_an_attempt_that_saved_nothing_ends_the_job(lines: list[dict[str, Any]]):
    assert decided(*lines) == Decision(
        "end", ExitCode.FAILED, "failed without saving anything new, which would repeat: see the log of each node"
    )


def test_a_finished_run_ends_the_job_with_success():
    assert decided(STARTED, FINISHED, signal="USR1") == Decision("end", ExitCode.FINISHED, "finished")


def test_what_slurm_ends_is_left_to_slurm():
    decision = decided(STARTED, signal="TERM")
    assert (decision.verdict, decision.exit_code) == ("leave", ExitCode.STOPPED)
    assert decision.reason == "ended at step 10 when Slurm ended the job (requeue, preemption or scancel)"


ALLOCATION = Allocation(job=7, nodes=1, cpus=1, gpus=0, ranks=1, array_task=None, max_requeues=3)


def test_only_requeues_by_the_script_count(tmp_path: Path):
    """Not those by Slurm itself, and not those of an earlier job in the same folder."""
    (tmp_path / "attempts.jsonl").write_text(
        '{"event": "requeued", "job": "6"}\n'
        + 2 * '{"event": "requeued", "job": "7"}\n'
        + '{"event": "lost", "job": "7"}\n'
    )
    decisions = []
    for _ in range(2):
        Journal(tmp_path, "7").begin()
        decisions.append(Journal(tmp_path, "7").end("USR1", ALLOCATION))
    assert [decision.verdict for decision in decisions] == ["requeue", "end"]
    assert decisions[0].reason.endswith("requeue 3 of 3")


def test_the_journal_reports_an_attempt_that_was_killed(tmp_path: Path):
    Journal(tmp_path, "7").begin()
    (tmp_path / "attempts.jsonl").write_text('{"event": "started", "step": 0, "token": "a"}\n')
    Journal(tmp_path, "7").begin()
    text = (tmp_path / "attempts.jsonl").read_text()
    assert '"event": "lost"' in text
    assert text.count('"token": "a"') == 2
    journal = Journal(tmp_path, "7")
    assert journal.end("USR1", ALLOCATION).verdict == "requeue"
    assert "attempt 1: lost without a report" in journal.comment
    assert "attempt 2: ended before training started on Slurm's warning" in journal.comment


def test_an_earlier_attempt_that_finished_does_not_count(tmp_path: Path):
    """A finished run that is extended: status.json says `finished` until the new attempt has begun."""
    (tmp_path / "status.json").write_text('{"status": "finished"}')
    (tmp_path / "attempts.jsonl").write_text('{"event": "finished", "step": 9, "token": "a"}\n')
    Journal(tmp_path, "7").begin()
    assert Journal(tmp_path, "7").end("USR1", ALLOCATION).verdict == "requeue"


@pytest.mark.parametrize(("cpus_per_node", "fewest"), [("4", 4), ("16(x2),2", 2), ("2,16(x3)", 2)])
def test_the_node_with_the_fewest_cpus_counts(cpus_per_node: str, fewest: int):
    assert fewest_cpus(cpus_per_node) == fewest
