"""The examples of docs/api.md run exactly as printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit.commands import ROOT

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
IMPORTS, SCRIPT, NOTEBOOK = EXAMPLES


def run(cwd: Path, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_the_imports_work(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, "-c", IMPORTS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_examples_are_type_checked(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    for place, example in enumerate((SCRIPT, NOTEBOOK)):
        (tmp_path / f"example{place}.py").write_text(example)
    options = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    done = run(tmp_path, sys.executable, "-m", "mypy", *options, "example0.py", "example1.py", MYPYPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(240)
def test_the_script_runs_under_torchrun_and_stops(tmp_path: Path) -> None:
    (tmp_path / "my_training.py").write_text(SCRIPT)
    (tmp_path / "STOP").write_text("")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "my_training.py")
    stopped = run(tmp_path, *command)
    assert stopped.returncode == 0, stopped.stderr
    status = json.loads((tmp_path / "runs/script/status.json").read_text())
    assert (status["status"], status["reason"]) == ("stopped", "the file STOP")
    (tmp_path / "STOP").unlink()
    resumed = run(tmp_path, *command)
    assert resumed.returncode == 0, resumed.stderr
    assert re.fullmatch(r"(30 steps, test accuracies \[0\.\d+, 0\.\d+\]\n){2}", resumed.stdout)


def test_the_script_reports_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "my_training.py").write_text(SCRIPT.replace('"lr": 0.05', '"lrr": 0.05'))
    done = run(tmp_path, sys.executable, "my_training.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: load_config(): optim.lrr = 0.05: unknown setting; did you mean optim.lr?\n"


@pytest.mark.timeout(240)
def test_the_notebook_cell_runs_twice_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "cell.py").write_text(NOTEBOOK)
    notebook = (
        "cell = compile(open('cell.py').read(), 'cell', 'exec')\nspace = {}\nfor _ in range(2): exec(cell, space)"
    )
    done = run(tmp_path, sys.executable, "-c", notebook)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(class \d \d+\.\d%\n){8}", done.stdout)
    assert "INFO    epoch 2/2 done in" in done.stderr
    assert "DEBUG" not in done.stderr
    attempts = [json.loads(line) for line in (tmp_path / "runs/notebook/attempts.jsonl").read_text().splitlines()]
    assert attempts[-1]["event"] == "finished"
