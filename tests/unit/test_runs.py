import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.abuse import assert_outcome, call

from distributed.run.lock_holder import this_process
from distributed.runs.outcome import outcome_of, runs_below

PAST = "2001-01-01T00:00:00+0000"


def a_run(folder: Path, epochs: int = 0, **status: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("epochs = 3\n")
    (folder / "status.json").write_text(json.dumps(status))
    lines = [
        {"kind": "epoch", "epoch": e, "step": e, "train_loss": 1.0, "seconds": 30.0,
         "validation": {"accuracy": 0.5 - e / 10}, "test": {"accuracy": 0.25 + e / 10}}
        for e in range(epochs)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def listed(folder: Path) -> list[list[str]]:
    """Return the cells of each row, split at two or more blanks."""
    found = call("runs.__main__", folder)
    assert found.code == 0, found.err
    return [line.replace("  ", "\t").split("\t") for line in found.out.splitlines()]


def test_all_runs_are_listed_with_their_results(tmp_path: Path) -> None:
    a_run(tmp_path / "one", epochs=2, status="finished", time=PAST)
    a_run(tmp_path / "sweep" / "seed-10", status="stopped")
    a_run(tmp_path / "sweep" / "seed-2", status="failed")
    (tmp_path / "one" / "checkpoints" / "inner").mkdir(parents=True)
    (tmp_path / "one" / "checkpoints" / "inner" / "config.toml").write_text("")
    _, one, *rest = [[cell for cell in row if cell.strip()] for row in listed(tmp_path)]
    assert [cell.strip() for cell in one] == [
        "one", "finished", "2 of 3", "50.00% (epoch 1)", "35.00% (epoch 2)", "2001-01-01 00:00", "1.0",
    ]  # fmt: skip
    assert [row[0].strip() for row in rest] == ["sweep/seed-2", "sweep/seed-10"]


def test_a_run_folder_lists_itself(tmp_path: Path) -> None:
    a_run(tmp_path / "one", status="finished")
    assert listed(tmp_path / "one")[1][0] == "one"


def test_the_default_folder_is_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs" / "one", status="finished")
    assert "one" in call("runs.__main__").out


def a_running_run(folder: Path, **holder: Any) -> Path:
    """A run whose attempt was started by this process, or by `holder`."""
    run = a_run(folder, status="running")
    (run / "attempt.json").write_text(json.dumps(this_process().as_json() | holder))
    return run


def test_a_run_with_a_live_process_is_running(tmp_path: Path) -> None:
    assert outcome_of(a_running_run(tmp_path / "a")).status == "running"


def test_a_run_without_its_process_is_interrupted(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert outcome_of(a_running_run(tmp_path / "a", pid=process.pid)).status == "interrupted"


def test_a_recycled_pid_does_not_count_as_alive(tmp_path: Path) -> None:
    assert outcome_of(a_running_run(tmp_path / "a", began="1")).status == "interrupted"


@pytest.mark.parametrize("place", [{"host": "another"}, {"machine": "another"}, {"pid_namespace": 1}], ids=str)
def test_a_run_on_another_machine_counts_as_running(tmp_path: Path, place: dict[str, Any]) -> None:
    assert outcome_of(a_running_run(tmp_path / "a", pid=2**22, **place)).status == "running"


BROKEN: dict[str, dict[str, bytes | None]] = {
    "empty files": {"status.json": b"", "config.toml": b"", "metrics.jsonl": b""},
    "bytes": {"status.json": b"\xff\0", "config.toml": b"\xff\0", "metrics.jsonl": b"\xff\0\n"},
    "other types": {
        "status.json": b'{"status": ["x"], "time": 5, "pid": "x"}',
        "config.toml": b'epochs = "x"',
        "metrics.jsonl": b'{"kind": "epoch", "epoch": 0, "step": 1, "validation": 3, "test": {"accuracy": "x"}}\n',
    },
    "a list": {"status.json": b"[1]", "config.toml": b"= =", "metrics.jsonl": b"[]\n5\nnull\n"},
    "no files but one": {"status.json": b"{}", "config.toml": None, "metrics.jsonl": None},
    "pipes": {"status.json": None, "config.toml": None, "metrics.jsonl": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_run_does_not_break_the_list(tmp_path: Path, kind: str) -> None:
    a_run(tmp_path / "good", status="finished")
    broken = a_run(tmp_path / "broken", status="finished")
    for name, content in BROKEN[kind].items():
        (broken / name).unlink()
        if content is not None:
            (broken / name).write_bytes(content)
        elif kind == "pipes":
            os.mkfifo(broken / name)
    _, first, second = listed(tmp_path)
    assert (first[0].strip(), second[0].strip()) == ("broken", "good")
    assert "unknown" in " ".join(first)


def test_names_cannot_send_terminal_escapes(tmp_path: Path) -> None:
    a_run(tmp_path / "a\n\x1b[2Jb", status="\x1b[2J")
    found = call("runs.__main__", tmp_path)
    assert (len(found.out.splitlines()), "\x1b" in found.out) == (2, False)


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_folder_without_runs_is_reported(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "runs"
    if kind == "empty":
        folder.mkdir()
    elif kind == "a file":
        folder.write_text("")
    assert_outcome(call("runs.__main__", folder), str(folder), "name the folder that holds runs")


def test_a_link_to_a_run_is_listed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(a_run(tmp_path / "disk" / "one", status="finished"))
    (tmp_path / "runs" / "other").symlink_to(tmp_path)
    a_run(tmp_path / "runs" / "two", status="finished")
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs" / "two")
    (tmp_path / "runs" / ".hidden").symlink_to(tmp_path / "disk" / "one")
    assert runs_below(tmp_path / "runs") == [tmp_path / "runs" / "linked", tmp_path / "runs" / "two"]


def test_circular_links_are_not_followed(tmp_path: Path) -> None:
    a_run(tmp_path / "a", status="finished")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert runs_below(tmp_path) == [tmp_path / "a"]
