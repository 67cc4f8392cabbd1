"""A suspended attempt that wakes up after another took over writes nothing more, and exits."""

import json
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from kit.commands import Command, attempts, kill

SETTINGS = (
    "configs/debug.toml", "--epochs", 400, "--schedule.name", "constant", "--data.train_samples", 60, "--data.test_samples", 20,
    "--global_batch_size", 20, "--logging.every_steps", 1, "--checkpoint.every_steps", 10, "--threads", 1, "--device", "cpu",
)  # fmt: skip


def lines(run: Path) -> list[tuple[str, int]]:
    file = run / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["kind"], line["step"]) for line in found]


@pytest.mark.timeout(240)
def test_superseded_attempt_writes_nothing_and_exits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [sys.executable, "-m", "distributed.train", *map(str, SETTINGS), "--run_dir", str(run)]
    with Command(arguments, output=tmp_path / "first") as first:
        first.wait_for(lambda: len(lines(run)) > 16, what="the first lines")
        kill(first.process.pid, number=signal.SIGSTOP)
        (run / ".lock").unlink()  # as on a file server that has lost contact with the node
        reached = lines(run)[-1][1]
        with Command(arguments, output=tmp_path / "second") as second:
            second.wait_for(
                lambda: len(attempts(run, "started")) == 2 and lines(run)[-1][1] > reached, what="the second"
            )
            kill(first.process.pid, number=signal.SIGCONT)
            assert first.wait(30) == 4, first.text
            last = lines(run)[-1][1]
            second.wait_for(lambda: lines(run)[-1][1] > last + 5, what="steps of the second alone")
            kill(second.process.pid, number=signal.SIGTERM)
            assert second.wait(60) == 75, second.text
    errors = [line for line in first.text.splitlines() if " ERROR " in line]
    assert len(errors) == 1, first.text
    assert f"was taken over by process {second.process.pid} on " in errors[0]
    assert "Traceback" not in first.text
    assert [line for line, count in Counter(lines(run)).items() if count > 1] == []
    assert [json.loads(line)["event"] for line in (run / "attempts.jsonl").read_text().splitlines()] == [
        "started", "started", "stopped",
    ]  # fmt: skip
    assert json.loads((run / "status.json").read_text())["pid"] == second.process.pid
