"""A command's exit code and files do not depend on whether its output can be written."""

import os
import signal
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
ENDS = {"with cleanup": "run_command(main)", "without cleanup": "run_command(main, skip_cleanup=True)"}


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
def test_broken_stream_keeps_the_exit_code(redirection: str, end: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("run_command(main)", ENDS[end])
    assert shell(redirection, tmp_path / "file", program) == 7
    number, done = (tmp_path / "file").read_text().split()
    assert (int(number) > 2, done) == (True, "done")  # otherwise the output would have gone into the file


def test_intact_stream_receives_all_output(tmp_path: Path) -> None:
    assert shell(f"> {tmp_path / 'out'} 2>&-", tmp_path / "file") == 7
    assert (tmp_path / "out").read_text() == f"{'out' * 10_000}\n" * 3


def test_unencodable_characters_are_escaped(tmp_path: Path) -> None:
    program = "from distributed.process.streams import run_command\nrun_command(lambda: print('\\udce9 \u00e9') or 0)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert (found.stdout, found.stderr) == ("\\udce9 \\xe9\n", "")


def test_keyboard_interrupt_exits_130_without_traceback() -> None:
    program = (
        "from distributed.process.streams import run_command\ndef main(): raise KeyboardInterrupt\nrun_command(main)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (130, "")


def test_child_process_inherits_open_streams(tmp_path: Path) -> None:
    """Otherwise a file it opens takes the descriptor, and its output goes into that file."""
    program = """
import subprocess, sys
from distributed.process.streams import run_command
def main():
    return subprocess.run([sys.executable, "-c", "import os; [os.fstat(n) for n in range(3)]"]).returncode
run_command(main)
"""
    assert shell("<&- >&- 2>&-", tmp_path / "file", program) == 0


def test_crash_in_c_code_prints_the_python_stack() -> None:
    program = (
        "import os\nfrom distributed.process.streams import run_command\ndef main(): os.abort()\nrun_command(main)"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in found.stderr
    assert "in main" in found.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "distributed.evaluate",
            ["run", "--split", "tset"],
            "command line: argument --split: invalid choice: 'tset' (",
        ),
        ("distributed.compare", ["run"], "command line: the following arguments are required: "),
        ("distributed.runs", ["--al"], "command line: unrecognized arguments: --al"),
        ("launch.slurm", [], "command line: the first argument names the config, e.g. cifar10"),
    ],
)
def test_a_wrong_argument_is_one_line(module: str, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith(f"error: {message}")
