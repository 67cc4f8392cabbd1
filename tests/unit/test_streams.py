"""A command's exit code and its files do not depend on who reads what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from distributed.process.streams import run_command
def main():
    file = open(sys.argv[1], "w")
    for _ in range(3):
        print("out" * 10_000)
        print("err" * 10_000, file=sys.stderr)
        sys.stdout.flush()
    file.write(f"{file.fileno()} done")
    file.close()
    return 7
run_command(main)
"""
ENDS = {"at exit": "run_command(main)", "at once": "run_command(main, at_once=True)"}


def shell(redirection: str, file: Path, program: str = PROGRAM) -> int:
    """The exit code of the program under bash."""
    command = ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-c", program, str(file)]
    return subprocess.run(command, timeout=60, check=False).returncode


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "> >(:)", "2> >(:)",
     "| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", "2>&1 | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}"],
)  # fmt: skip
def test_a_lost_stream_changes_no_exit_code(redirection: str, end: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("run_command(main)", ENDS[end])
    assert shell(redirection, tmp_path / "file", program) == 7
    number, done = (tmp_path / "file").read_text().split()
    assert (int(number) > 2, done) == (True, "done")  # else prints would have gone into it


def test_what_is_printed_arrives_up_to_the_loss(tmp_path: Path) -> None:
    assert shell(f"> {tmp_path / 'out'} 2>&-", tmp_path / "file") == 7
    assert (tmp_path / "out").read_text() == f"{'out' * 10_000}\n" * 3


def test_a_name_that_no_encoding_knows_is_printed(tmp_path: Path) -> None:
    program = "from distributed.process.streams import run_command\nrun_command(lambda: print('\\udce9 \u00e9') or 0)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert (found.stdout, found.stderr) == ("\\udce9 \\xe9\n", "")


def test_an_interrupt_is_one_exit_code_and_no_traceback() -> None:
    program = (
        "from distributed.process.streams import run_command\ndef main(): raise KeyboardInterrupt\nrun_command(main)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (130, "")


def test_a_child_finds_no_closed_stream(tmp_path: Path) -> None:
    """Else a file that it opens takes the number, and what it prints goes into that file."""
    program = """
import subprocess, sys
from distributed.process.streams import run_command
def main():
    return subprocess.run([sys.executable, "-c", "import os; [os.fstat(n) for n in range(3)]"]).returncode
run_command(main)
"""
    assert shell("<&- >&- 2>&-", tmp_path / "file", program) == 0
