"""Nodes' reports on their way to the doctor, however garbled, and commands that fail or do not end."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed.errors import InputError
from launch.doctor.diagnosis import table, wrong
from launch.doctor.reports import bounded, lines_of, of_nodes, read
from unit.test_verdict import reports

NODES = ["n0", "n1", "n2"]


def judged(out: str) -> list[str]:
    """The doctor's lines on what the nodes printed."""
    answers = read(out, NODES)
    found = list(answers.reports.values())
    assert table(found)
    return wrong(found, NODES, token=True, gpus=8, free_gib=1.0, silent=answers.silent)


def with_n1(**changed: Any) -> str:
    """What three nodes print, n1 with other parts."""
    found = reports()
    found[1] |= changed
    return "".join(map(lines_of, found))


def test_a_report_comes_in_short_lines_in_any_order():
    found = reports()
    found[0]["network"]["gib_per_second"] = {str(other): 9.0 for other in range(1, 500)}
    lines = [line for report in found for line in lines_of(report).splitlines()]
    assert len(lines) > 10
    assert max(map(len, lines)) < 1000, "srun passes on 1,024 bytes at a time"
    answers = read("\n".join(["a banner", *lines[::-1], "Bye"]), NODES)
    assert answers.silent == {}
    assert answers.reports == {report["node"]: report for report in found}
    assert judged(with_n1()) == []


GARBAGE = [
    ("cut off", "doctor-report:n1 1/2 {", "cannot be read"),
    ("no JSON", "doctor-report:n1 1/1 Segmentation fault", "cannot be read: 'Segmentation fault'"),
    ("no number", "doctor-report:n1 x/y {}", "cannot be read"),
    ("huge count", f"doctor-report:n1 1/{'9' * 5000} x", "cannot be read"),
    ("only its name", "doctor-report:n1", "cannot be read"),
    ("a list", "doctor-report:n1 1/1 [1, 2]", "cannot be read"),
    ("nested deep", f"doctor-report:n1 1/1 {'[' * 100_000}", "cannot be read"),
    ("nothing of its own", "n1 says hello", "no answer;"),
    ("a node that was not asked", 'doctor-report:n9 1/1 {"node": "n1"}', "no answer;"),
]


@pytest.mark.parametrize(("out", "said"), [case[1:] for case in GARBAGE], ids=[case[0] for case in GARBAGE])
def test_garbage_of_a_node_names_that_node(out: str, said: str):
    others = "".join(lines_of(report) for report in reports() if report["node"] != "n1")
    lines = judged(f"{others}{out}\n")
    assert [line.partition(":")[0] for line in lines if "n1" in line.partition(":")[0]] == ["n1"]
    assert said in lines[0]


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("versions", None, "n1: versions: its report has 'None' there"),
        ("versions", {"error": "E"}, "n1: versions: E"),
        ("code", {"error": "E"}, "n1: its files of the project: E"),
        ("code", 7, "n1: its files of the project: its report has '7' there"),
        ("data", [], "n1: data: its report has '[]' there"),
        ("data", {"root": "x"}, "n1: data: its report has no usable error"),
        ("devices", {"gpus": "8"}, "n1: devices: its report has no usable gpus, gpu_memory_gib, cores, memory_gib"),
        ("folder", {}, "n1: run folder: its report has no usable path, sees_token, writable, free_gib"),
        ("network", {}, "n1: network: its report has no usable met"),
        ("network", {"met": [0, 1, 2], "clock_seconds": "late"}, "n1: network: its report has no numbers there"),
        ("network", {"met": [0, 1, 2], "gib_per_second": {"x": 1.0}}, "n1: network: its report has no numbers there"),
    ],
)
def test_a_part_of_another_form_is_one_line(part: str, value: Any, said: str):
    lines = judged(with_n1(**{part: value}))
    assert len(lines) == 1
    assert lines[0].startswith(said)


def test_silence_of_every_node_is_a_line_each():
    lines = judged("srun: error: Unable to create step\n")
    assert [line.partition(":")[0] for line in lines] == NODES
    silent = {"n1": "Communication connection failure; Slurm has it as DOWN*"}
    assert "n1: no answer: Communication connection failure; Slurm has it as DOWN*; see sinfo" in "\n".join(
        wrong([], NODES, token=False, gpus=0, free_gib=1.0, silent=silent)
    )


def test_a_command_that_fails_does_not_end_or_is_not_there():
    assert bounded([sys.executable, "-c", "print(1)"], 30) == ("1\n", "")
    assert bounded(["sh", "-c", "echo srun: error: no such node >&2; echo bye >&2; exit 3"], 30)[1] == (
        "srun: error: no such node"
    )
    assert bounded(["sh", "-c", "exit 3"], 30)[1] == "exit code 3"
    printed, problem = bounded(["sh", "-c", "echo begun; echo waiting for resources >&2; exec sleep 60"], 0.3)
    assert (printed, problem) == ("begun\n", "no end after 0.3 s: waiting for resources")
    with pytest.raises(InputError, match="no-such-srun: No such file"):
        bounded(["no-such-srun"], 1)


def test_bytes_that_are_no_text_do_no_harm():
    printed, _ = bounded([sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)))"], 30)
    assert judged(printed + with_n1()) == []
    assert json.dumps(printed)


SRUN = """#!/bin/sh
for word; do case $word in --nodelist=*) exec cat "$(dirname "$0")/${word#--nodelist=}" ;; esac; done
echo "a watchdog has ended the probe" >&2
exit 134
"""


def test_nodes_that_answer_only_alone_are_no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """E.g. a collective that hangs: each probe dies without a report, and alone each node is fine."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    for report in reports():
        (tmp_path / report["node"]).write_text(lines_of(report | {"network": {}}))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answers = of_nodes([], NODES, seconds=1)
    lines = wrong(list(answers.reports.values()), NODES, token=True, gpus=8, free_gib=1.0, silent=answers.silent)
    assert [line.partition(":")[0] for line in lines] == NODES
    assert all("tested together" in line and "watchdog" in line for line in lines), lines
