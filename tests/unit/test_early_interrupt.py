"""Ctrl-C while a command imports its modules ends it with code 130 and without a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERRUPTS = (
    "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nraise SystemExit('not interrupted')"
)
COMMANDS = ["train", "evaluate", "compare", "predict", "runs", "report", "export", "bench", "experiments"]
LAUNCHERS = ["ray_train", "slurm", "doctor", "summary"]
MODULES = [f"distributed.{name}" for name in COMMANDS] + [f"launch.{name}" for name in LAUNCHERS]


def interrupted(module: str, tmp_path: Path, *, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE --help` with a pydantic that sends SIGINT when it is imported."""
    (tmp_path / "pydantic.py").write_text(INTERRUPTS)
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    return subprocess.run(
        [sys.executable, "-m", module, "--help"], env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_interrupted_import_prints_no_traceback(module: str, tmp_path: Path) -> None:
    ended = interrupted(module, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    assert interrupted("distributed.runs", tmp_path, ignored=True).stderr == "not interrupted\n"


def test_another_program_keeps_its_handler(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import distributed")
    (package / "__main__.py").write_text("import signal\nprint(signal.getsignal(signal.SIGINT).__name__)")
    assert interrupted("mine", tmp_path).stdout == "default_int_handler\n"
