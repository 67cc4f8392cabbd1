"""A command that starts processes leaves none behind, whatever ends it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kit.cluster import wait_for
from kit.commands import running

from distributed.process.session import run_in_session

PROGRAM = """
import sys
from distributed.bench.workload import run
from distributed.process.streams import run_command
run_command(lambda: run(["sh", "-c", f"echo $$ > {sys.argv[1]}; exec sleep 60"]).code, starts_processes=True)
"""
HANGS_UP = """
import os, signal
from distributed.process.streams import run_command
signal.signal(signal.SIGHUP, signal.{})
run_command(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7, starts_processes=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the kernel ends the child")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_command_that_is_killed_leaves_no_child(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, file], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ) as process:
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"), seconds=60, description="a child")
        child = int(file.read_text())
        assert running(child)
        process.send_signal(number)
        wait_for(lambda: not running(child), seconds=10, description="the end of the child")


@pytest.mark.parametrize(("handler", "code"), [("SIG_DFL", 129), ("SIG_IGN", 7)])
def test_a_hangup_ends_a_command_unless_it_is_ignored(handler: str, code: int) -> None:
    program = HANGS_UP.replace("{}", handler)
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == code


def test_a_command_has_a_time_limit(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as file:
        assert run_in_session(["sleep", "60"], 0.1, stdout=file, stderr=file) is None
        assert run_in_session(["sh", "-c", "exit 5"], None, stdout=file, stderr=file) == 5
