"""The examples of docs/your-own.md run exactly as printed, in a folder outside the checkout."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from kit.commands import ROOT, status

PAGE = (ROOT / "docs/your-own.md").read_text()
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(heading: str) -> list[tuple[str, str]]:
    """Return the language and content of each block under a heading."""
    section = PAGE.partition(f"{heading}\n")[2]
    return FENCE.findall(re.split(r"^##+ ", section, maxsplit=1, flags=re.MULTILINE)[0])


def run(folder: Path, command: str) -> "subprocess.CompletedProcess[str]":
    """Run a printed command with this Python, on the CPU."""
    words = shlex.split(command.replace("torchrun ", "python -m torch.distributed.run "))
    own = ["--device", "cpu", "--run_dir", "run"] if "distributed.train" in words else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words[1:], *own], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("heading", ["### Arrays in a folder", "### Arrays from a function"])
def test_the_example_trains(heading: str, tmp_path: Path) -> None:
    commands = []
    for language, content in blocks(heading):
        if language == "bash":
            commands += content.strip().splitlines()
        else:
            (tmp_path / content.partition("\n")[0].removeprefix("# ")).write_text(content)
    assert commands
    for command in commands:
        done = run(tmp_path, command)
        assert done.returncode == 0, done.stderr[-3000:]
    assert status(tmp_path / "run")["status"] == "finished"
