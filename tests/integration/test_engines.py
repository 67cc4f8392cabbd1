"""Sharded engines as a user starts them: killed and resumed, without a compiler, with a missing or outdated DeepSpeed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from kit.commands import NARROW, ROOT, Command, assert_same_bits, attempts, kill, status, torchrun

SETTINGS = (
    "configs/debug.toml", "--epochs", 4, "--data.train_samples", 800, "--checkpoint.every_steps", 5, *NARROW,
    "--device", "cpu",
)  # fmt: skip
ENGINES = {
    "zero 3": ("--engine.name", "deepspeed", "--engine.zero_stage", 3),
    "fsdp": ("--engine.name", "fsdp", "--exact.shards", 0),
}


def finish(ranks: int, run: Path, *more: object) -> str:
    with Command(torchrun(ranks, *SETTINGS, *more, "--run_dir", run), output=run.with_suffix(".out")) as command:
        assert command.wait() == 0, command.text[-3000:]
        return command.text


def saves(run: Path) -> int:
    file = run / "digests.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_rank_leaves_the_bits_unchanged(name: str, tmp_path: Path) -> None:
    run, undisturbed, dice = tmp_path / "run", tmp_path / "undisturbed", random.Random(name)
    finish(2, undisturbed, *ENGINES[name])
    with Command(torchrun(2, *SETTINGS, *ENGINES[name], "--run_dir", run), output=tmp_path / "output") as command:
        command.wait_for(lambda: saves(run) >= 3, what="three saves")
        kill(dice.choice(command.ranks()))
        assert command.wait() != 0
    finish(2, run, *ENGINES[name])
    assert len(attempts(run, "started")) == 2
    assert_same_bits(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_deepspeed_needs_no_compiler(tmp_path: Path) -> None:
    """It compiles no extension either: that happens behind a lock that a killed process would never release."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "env").symlink_to("/usr/bin/env")
    found = {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "", "CC": ""}
    run = tmp_path / "run"
    settings = ("configs/debug.toml", "--epochs", 1, "--data.train_samples", 300, *NARROW, "--device", "cpu")
    arguments = torchrun(2, *settings, "--engine.name", "deepspeed", "--engine.zero_stage", 2, "--run_dir", run)
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, **found}, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(run)["status"] == "finished"
    assert not (tmp_path / "extensions").exists()
    assert "DeepSpeed" not in done.stdout
    assert done.stderr.count("WARNING") == 1, "only the warning about generated images"


@pytest.mark.parametrize("found", ["0.14.2", None], ids=["too old", "missing"])
def test_missing_or_outdated_deepspeed_is_one_line(found: str | None, tmp_path: Path) -> None:
    """The installed version is read from package metadata, where the first match on the path wins."""
    paths = [str(ROOT)]
    if found:
        metadata = tmp_path / f"deepspeed-{found}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {found}\n")
        paths.insert(0, str(tmp_path))
        need = "deepspeed 0.19 or later, but 0.14.2 is installed"
    else:
        (tmp_path / "sitecustomize.py").write_text(HIDDEN)
        paths.insert(0, str(tmp_path))
        need = "the package deepspeed"
    command = [sys.executable, "-m", "distributed.train", "--data.name", "generated10", "--engine.name", "deepspeed"]
    command += ["--device", "cpu"]
    done = subprocess.run(
        [*command, "--run_dir", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: engine.name = deepspeed needs {need}: pip install 'deepspeed>=0.19'"]
    assert not (tmp_path / "run").exists()


HIDDEN = """
from importlib import metadata

found = metadata.version


def version(name):
    if name == "deepspeed":
        raise metadata.PackageNotFoundError(name)
    return found(name)


metadata.version = version
"""
