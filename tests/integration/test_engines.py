"""Sharded engines as a user starts them: killed and resumed, without a compiler, with a missing or outdated DeepSpeed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from kit.commands import NARROW, ROOT, Command, assert_same_bits, attempts, kill, status, torchrun
from kit.speed import slowness

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


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """A run under ZeRO 3 where no compiler is on the path."""
    folder = tmp_path_factory.mktemp("zero 3")
    (folder / "bin").mkdir()
    (folder / "bin" / "env").symlink_to("/usr/bin/env")
    found = {"PATH": str(folder / "bin"), "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "CXX": "", "CC": ""}
    arguments = torchrun(2, *SETTINGS, *ENGINES["zero 3"], "--run_dir", folder / "run")
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **found},
        capture_output=True,
        text=True,
        timeout=250 * slowness(),
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_deepspeed_needs_no_compiler(without_compiler: "subprocess.CompletedProcess[str]") -> None:
    """It compiles no extension either: that happens behind a lock that a killed process would never release."""
    assert without_compiler.returncode == 0, without_compiler.stderr[-3000:]
    run = Path(without_compiler.args[-1])
    assert status(run)["status"] == "finished"
    assert not (run.parent / "extensions").exists()
    assert "DeepSpeed" not in without_compiler.stdout
    assert without_compiler.stderr.count("WARNING") == 1, "only the warning about generated images"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_rank_leaves_the_bits_unchanged(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run, dice = tmp_path / "run", random.Random(name)
    if name == "zero 3":
        undisturbed = Path(request.getfixturevalue("without_compiler").args[-1])
    else:
        undisturbed = tmp_path / "undisturbed"
        finish(2, undisturbed, *ENGINES[name])
    with Command(torchrun(2, *SETTINGS, *ENGINES[name], "--run_dir", run), output=tmp_path / "output") as command:
        command.wait_for(lambda: saves(run) >= 3, what="three saves")
        kill(dice.choice(command.ranks()))
        assert command.wait() != 0
    finish(2, run, *ENGINES[name])
    assert len(attempts(run, "started")) == 2
    assert_same_bits(run, undisturbed)


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
