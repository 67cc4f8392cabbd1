"""Reports on their way to the doctor, however garbled, and commands that fail or hang."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distributed.config import from_command_line
from distributed.errors import InputError
from launch.doctor.bounded import run_bounded
from launch.doctor.collect import reports_of_job
from launch.doctor.diagnosis import diagnose, table
from launch.doctor.probe import check_data
from launch.doctor.reports import NodeReport, read_reports, to_lines
from unit.test_diagnosis import NODES, good_reports


def diagnosed(printed: str) -> list[str]:
    """Return the doctor's lines on what the nodes printed."""
    answers = read_reports(printed, NODES)
    reports = list(answers.reports.values())
    assert table(reports)
    return diagnose(reports, NODES, several=True, gpus=8, free_gib=1.0, silent=answers.silent)


def printed_with(**changed: Any) -> str:
    """Return what three nodes print, n1 with these sections."""
    good, *_ = good_reports()
    report = json.dumps({**good_reports()[1].model_dump(mode="json"), **changed})
    others = "".join(to_lines(report) for report in (good, good_reports()[2]))
    return f"{others}doctor-report:n1 1/1 {report}\n"


def test_a_report_arrives_as_short_lines_in_any_order():
    reports = good_reports()
    network = reports[0].network.model_copy(update={"gib_per_second": dict.fromkeys(range(1, 500), 9.0)})
    reports[0] = reports[0].model_copy(update={"network": network})
    lines = [line for report in reports for line in to_lines(report).splitlines()]
    assert len(lines) > 10
    assert max(map(len, lines)) < 1000, "srun passes on 1,024 bytes at a time"
    answers = read_reports("\n".join(["a banner", *lines[::-1], "Bye"]), NODES)
    assert answers.silent == {}
    assert answers.reports == {report.node: report for report in reports}
    assert diagnosed(printed_with()) == []


def test_a_run_on_cpus_needs_no_equal_gpus():
    reports = good_reports()
    reports[1] = reports[1].model_copy(update={"devices": reports[1].devices.model_copy(update={"gpus": 2})})
    for gpus, failures in ((8, 1), (None, 0)):
        assert len(diagnose(reports, NODES, several=True, gpus=gpus, free_gib=1.0)) == failures


GARBAGE = [
    ("cut off", "doctor-report:n1 1/2 {", "cannot be read"),
    ("no JSON", "doctor-report:n1 1/1 Segmentation fault", "cannot be read: 'Segmentation fault'"),
    ("no number", "doctor-report:n1 x/y {}", "cannot be read"),
    ("huge count", f"doctor-report:n1 1/{'9' * 5000} x", "cannot be read"),
    ("only its name", "doctor-report:n1", "cannot be read"),
    ("a list", "doctor-report:n1 1/1 [1, 2]", "cannot be read"),
    ("deep nesting", f"doctor-report:n1 1/1 {'[' * 100_000}", "cannot be read"),
    ("no report", "n1 says hello", "no answer;"),
    ("an unknown node", 'doctor-report:n9 1/1 {"node": "n1"}', "no answer;"),
]


@pytest.mark.parametrize(("printed", "message"), [case[1:] for case in GARBAGE], ids=[case[0] for case in GARBAGE])
def test_garbage_from_a_node_names_that_node(printed: str, message: str):
    others = "".join(to_lines(report) for report in good_reports() if report.node != "n1")
    lines = diagnosed(f"{others}{printed}\n")
    assert [line.partition(":")[0] for line in lines if "n1" in line.partition(":")[0]] == ["n1"]
    assert message in lines[0]


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("versions", None, "n1: versions: it is missing from its report"),
        ("versions", [], "n1: versions: its report has '[]' there"),
        ("versions", {"torch": 2}, "n1: versions: its report has no usable torch"),
        ("errors", {"versions": "E"}, "n1: versions: E"),
        ("code", 7, "n1: its copy of the project: its report has '7' there"),
        ("data", [], "n1: data: its report has '[]' there"),
        ("devices", {"gpus": "8"}, "n1: devices: its report has no usable gpus, gpu_memory_gib, cores, memory_gib"),
        ("folder", {}, "n1: run folder: its report has no usable path, sees_token, writable, free_gib"),
        ("network", {}, "n1: network: its report has no usable present"),
        ("network", {"present": [0, 1, 2], "clock_seconds": "late"}, "n1: network: its report has no usable clock_seconds"),
        ("network", {"present": [0, 1, 2], "gib_per_second": {"x": 1.0}}, "n1: network: its report has no usable gib_per_s"),
    ],
)  # fmt: skip
def test_a_malformed_section_is_one_line(section: str, value: Any, message: str):
    changed = {section: value} if section != "errors" else {"errors": value, "versions": None}
    [line] = diagnosed(printed_with(**changed))
    assert line.startswith(message)


def test_malformed_errors_do_not_hide_the_report():
    assert diagnosed(printed_with(errors=[1])) == []


def test_every_silent_node_is_one_line():
    lines = diagnosed("srun: error: Unable to create step\n")
    assert [line.partition(":")[0] for line in lines] == NODES
    silent = {"n1": "Communication connection failure; its state in Slurm is DOWN*"}
    lines = diagnose([], NODES, several=False, gpus=0, free_gib=1.0, silent=silent)
    assert f"n1: no answer: {silent['n1']}; see sinfo" in "\n".join(lines)


def test_commands_that_fail_or_hang_have_a_reason():
    assert run_bounded([sys.executable, "-c", "print(1)"], 30) == ("1\n", "")
    assert run_bounded(["sh", "-c", "echo srun: error: no such node >&2; echo bye >&2; exit 3"], 30)[1] == (
        "srun: error: no such node"
    )
    assert run_bounded(["sh", "-c", "exit 3"], 30)[1] == "exit code 3"
    printed, problem = run_bounded(["sh", "-c", "echo begun; echo waiting for resources >&2; exec sleep 60"], 0.3)
    assert (printed, problem) == ("begun\n", "still running after 0.3 s: waiting for resources")
    with pytest.raises(InputError, match="no-such-srun: No such file"):
        run_bounded(["no-such-srun"], 1)


def test_a_stopped_doctor_ends_its_command(tmp_path: Path):
    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(SystemExit):
            run_bounded(["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 1; kill -ALRM $PPID; exec sleep 60"], 30)
    finally:
        signal.signal(signal.SIGALRM, before)
    process = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    ends = time.monotonic() + 20
    while process.exists() and ") Z " not in process.read_text():
        assert time.monotonic() < ends, "still running"
        time.sleep(0.05)


def test_binary_output_does_no_harm():
    command = [sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)))"]
    assert diagnosed(run_bounded(command, 30).printed + printed_with()) == []


SRUN = """#!/bin/sh
for word; do case $word in --nodelist=*) exec cat "$(dirname "$0")/${word#--nodelist=}" ;; esac; done
echo "a watchdog has ended the probe" >&2
exit 134
"""


def test_nodes_that_answer_only_alone_are_no_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """E.g. a collective that hangs: each probe dies without a report, and alone each node is fine."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    for report in good_reports():
        (tmp_path / report.node).write_text(to_lines(report.model_copy(update={"network": None})))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answers = reports_of_job([], NODES, seconds=1)
    reports: list[NodeReport] = list(answers.reports.values())
    lines = diagnose(reports, NODES, several=True, gpus=8, free_gib=1.0, silent=answers.silent)
    assert [line.partition(":")[0] for line in lines] == NODES
    assert all("tested together" in line and "watchdog" in line for line in lines), lines


def test_in_a_job_the_probe_requires_data_even_if_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = from_command_line(["--data.root", str(tmp_path)])
    config, named = command.config, command.names_data
    assert named
    for name in ("SLURM_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    assert check_data(config, names_data=False) == "none named"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(InputError, match="data_batch_1"):
        check_data(config, names_data=False)
