"""A run that loses processes and gets them back ends with the same bits as an undisturbed run."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from kit.commands import NARROW, ROOT, Command, alone, assert_same_bits, attempts, kill, status, torchrun

SETTINGS = (
    "configs/debug.toml", "--epochs", 2, "--data.train_samples", 2500, "--checkpoint.every_steps", 5, *NARROW,
    "--device", "cpu",
)  # fmt: skip


def compare(a: Path, b: Path) -> tuple[int, str]:
    """Return exit code and output of `python -m distributed.compare A B`."""
    command = [sys.executable, "-m", "distributed.compare", str(a), str(b)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def saves(run: Path) -> int:
    file = run / "digests.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def finish(ranks: int, run: Path, *more: object) -> None:
    with Command(torchrun(ranks, *SETTINGS, *more, "--run_dir", run), output=run.with_suffix(".out")) as command:
        assert command.wait() == 0, command.text[-3000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of plain Python, without torchrun."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(alone(*SETTINGS, "--threads", 2, "--run_dir", run), output=run.with_suffix(".out")) as command:
        assert command.wait() == 0, command.text[-3000:]
    return run


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_resume_on_4_3_1_and_4_processes_keeps_the_bits(undisturbed: Path, tmp_path: Path) -> None:
    run, dice = tmp_path / "run", random.Random(0)
    for ranks in (4, 3, 1):
        before = saves(run)
        with Command(torchrun(ranks, *SETTINGS, "--run_dir", run), output=tmp_path / "output") as command:
            # After two more saves, between two saves: the steps since the last one are repeated on other ranks.
            command.wait_for(lambda: saves(run) >= before + 2, what="two saves")  # noqa: B023
            kill(dice.choice(command.ranks()))
            assert command.wait() != 0
    finish(4, run)
    sizes = [attempt["world_size"] for attempt in attempts(run, "started")]
    steps = [attempt["step"] for attempt in attempts(run, "started")]
    print(f"attempts on {sizes} processes began at steps {steps} of {status(run)['step']}")
    assert sizes == [4, 3, 1, 4]
    assert steps == sorted(set(steps))
    assert_same_bits(run, undisturbed)
    code, output = compare(run, undisturbed)
    assert (code, output.startswith("bit-identical: ")) == (0, True), output


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_compare_reports_where_runs_diverge_and_why(undisturbed: Path, tmp_path: Path) -> None:
    finish(2, tmp_path / "run", "--optim.lr", 0.0999)
    code, output = compare(tmp_path / "run", undisturbed)
    print(output)
    assert code == 1
    assert "not bit-identical: " in output
    assert "diverged by step 5: " in output
    assert "config: optim.lr = 0.0999 | 0.1" in output
    assert "world_size: 2 | 1" in output
