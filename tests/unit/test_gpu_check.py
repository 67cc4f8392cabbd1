"""How `distributed.gpu_check` runs steps: steps that fail in every way, each in a real process."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from kit.commands import ROOT, running

from distributed.gpu_check.__main__ import main
from distributed.gpu_check.steps import STEPS, Step

SOURCES = {
    "step_fails": """
        with checks.check("sums") as figures:
            figures["found"] = 3
            assert 1 + 1 == 3, "two, not three"
        with checks.check("raises"):
            raise ValueError("no such number")
        with checks.check("after them"):
            pass
    """,
    "step_aborts": """
        with checks.check("before") as figures:
            figures["scratch"] = str(checks.scratch)
        print("CHECK {\\"check\\": \\"cut o", end="", flush=True)
        os.abort()
    """,
    "step_hangs": """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with checks.check("children") as figures:
            figures |= {"pids": [os.getpid(), child.pid], "scratch": str(checks.scratch)}
        time.sleep(600)
    """,
    "step_leaves": """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with checks.check("children") as figures:
            figures["pids"] = [os.getpid(), child.pid]
    """,
    "step_is_fine": """
        with checks.check("device") as figures:
            figures |= {"device": checks.device.type, "tiny": checks.tiny, "folder": checks.scratch.is_dir()}
    """,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the steps' modules, importable by their processes."""
    for name, body in SOURCES.items():
        text = f"import os, subprocess, sys, time\n\n\ndef run(checks):{body.rstrip()}\n"
        (tmp_path / f"{name}.py").write_text(text.replace("\n        ", "\n    "))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    return tmp_path


def results(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "gpu_check.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def exit_code_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, seconds: int = 60, within: float = 300
) -> int:
    """Run these steps with a time limit of `seconds` each, and return the exit code."""
    steps = [Step(name.removeprefix("step_"), seconds, module=name) for name in names]
    out = ["--out", str(folder / "out"), "--seconds", str(within)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--tiny", *out])
    return main(steps)


@pytest.mark.slow
def test_a_failing_step_does_not_stop_the_next(folder, monkeypatch, capsys):
    names = ("step_fails", "step_aborts", "step_leaves", "step_is_fine")
    assert exit_code_of(folder, monkeypatch, *names) == 1
    found = results(folder / "out")
    assert {step: line["verdict"] for step, line in found.items()} == {
        "fails": "fail", "aborts": "error", "leaves": "pass", "is_fine": "pass"
    }  # fmt: skip
    failed, raised, after = found["fails"]["checks"]
    assert (failed["verdict"], failed["figures"], failed["message"]) == ("fail", {"found": 3}, "two, not three")
    assert raised["verdict"] == "error"
    assert "ValueError: no such number" in raised["message"]
    assert after["verdict"] == "pass"
    (before,) = found["aborts"]["checks"]
    assert before["check"] == "before"
    assert not Path(before["figures"]["scratch"]).exists()
    assert found["aborts"]["exit_code"] == -6
    assert found["is_fine"]["checks"][0]["figures"] == {"device": "cpu", "tiny": True, "folder": True}
    assert not any(map(running, found["leaves"]["checks"][0]["figures"]["pids"]))
    printed = capsys.readouterr().out
    assert "2 of 4 steps passed; see fails, aborts" in printed
    assert "two, not three" in printed


@pytest.mark.slow
def test_a_step_past_its_limit_ends_with_its_children(folder, monkeypatch):
    assert exit_code_of(folder, monkeypatch, "step_hangs", "step_is_fine", seconds=15) == 1
    found = results(folder / "out")
    assert found["hangs"]["verdict"] == "timeout"
    (check,) = found["hangs"]["checks"]
    assert check["verdict"] == "pass"
    assert not any(map(running, check["figures"]["pids"]))
    assert not Path(check["figures"]["scratch"]).exists()
    assert found["is_fine"]["verdict"] == "pass"


def test_no_step_starts_after_the_total_time_limit(folder, monkeypatch):
    assert exit_code_of(folder, monkeypatch, "step_is_fine", within=0) == 1
    line = results(folder / "out")["is_fine"]
    assert (line["verdict"], line["checks"]) == ("timeout", [])


def test_steps_have_unique_names_and_time_limits():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    assert all(10 <= step.seconds <= 130 for step in STEPS)
    assert STEPS[2].module == "distributed.gpu_check.units"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_check_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out")])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: --device cuda: no CUDA device is visible; ")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", __file__])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1
