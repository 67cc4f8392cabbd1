"""Kills at any moment, of any process: the resumed run ends bit-identical to an undisturbed one."""

import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from kit.abuse import call
from kit.commands import NARROW, Command, alone, assert_same_bits, attempts, has_saved, kill, status, torchrun
from kit.killed_in_save import POINTS
from kit.slow_sink import SLOW

SETTINGS = (
    "configs/debug.toml", "--epochs", 6, "--data.train_samples", 700, "--checkpoint.every_steps", 4,
    "--data.test_samples", 60, "--grad_accum_steps", 2, "--logging.every_steps", 2, *NARROW, "--threads", 1,
    "--device", "cpu",
)  # fmt: skip
KINDS = ("kill -9 a rank", "kill -9 the agent", "kill -9 everything", "SIGTERM to the agent", "SIGTERM to a rank")


@dataclass(frozen=True)
class Mode:
    """Settings of a run, the number of ranks of each attempt in turn, and the number of strikes."""

    name: str
    settings: tuple[object, ...]
    ranks: tuple[int, ...]
    strikes: int


MODES = (
    Mode("exact", (*SETTINGS, "--exact.shards", 4), (1, 2, 3, 4), strikes=2 * len(KINDS)),
    Mode("fast", (*SETTINGS, "--exact.shards", 0), (2,), strikes=len(KINDS)),
)


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: mode.name)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mode, Path]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    mode = request.param
    start = alone if mode.name == "exact" else partial(torchrun, mode.ranks[-1])
    with Command(start(*mode.settings, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return mode, run


def kill_something(command: Command, kind: str, dice: random.Random) -> None:
    agent, ranks = command.process.pid, command.ranks()
    if kind == "kill -9 a rank":
        kill(dice.choice(ranks))
    elif kind == "kill -9 the agent":
        kill(agent)
    elif kind == "kill -9 everything":
        kill(agent, *ranks)
    elif kind == "SIGTERM to the agent":
        kill(agent, number=signal.SIGTERM)
    else:
        kill(dice.choice(ranks), number=signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_keep_the_bits(undisturbed: tuple[Mode, Path], tmp_path: Path) -> None:
    """Each strike waits for the attempt's first checkpoint. In exact mode the number of ranks changes each time."""
    mode, reference = undisturbed
    run, dice, kills = tmp_path / "run", random.Random(mode.name), 0
    for attempt in range(30):
        ranks = mode.ranks[attempt % len(mode.ranks)]
        known, slow = len(attempts(run, "started")), SLOW if kills < mode.strikes else ()
        with Command(torchrun(ranks, *mode.settings, *slow, "--run_dir", run), output=tmp_path / "output") as command:
            if kills < mode.strikes:
                saved = partial(has_saved, run, attempt=known + 1)
                command.wait_for(saved, seconds=240, what="the attempt's first checkpoint")
                time.sleep(dice.uniform(0, 0.5))
                if command.process.poll() is None:
                    kill_something(command, KINDS[attempt % len(KINDS)], dice)
                    kills += 1
            command.wait()
            command.wait_for_ranks()  # those orphaned by the agent detect its death, save and exit
            if status(run).get("status") == "finished":
                break
    steps = [attempt["step"] for attempt in attempts(run, "started")]
    print(f"{kills} kills; attempts began at steps {steps} of {status(reference)['step']}")
    assert kills >= mode.strikes - 2, "the run ended before it was killed often enough: make it longer"
    assert sum(step > 0 for step in steps) > len(steps) / 2, steps
    assert "the launcher's death" in [attempt["reason"] for attempt in attempts(run, "stopped")]
    assert_same_bits(run, reference)
    compared = call("compare", run, reference)
    assert (compared.code, compared.out.startswith("bit-identical: ")) == (0, True), compared.out


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kill_at_each_point_of_a_save_keeps_the_bits(undisturbed: tuple[Mode, Path], tmp_path: Path) -> None:
    mode, reference = undisturbed
    run = tmp_path / "run"
    for number, point in enumerate(POINTS):
        if mode.name == "fast" and number in (1, 3):  # the same code as in exact mode
            continue
        ranks = mode.ranks[number % len(mode.ranks)]
        arguments = torchrun(
            ranks, point, 10 + 20 * number, *mode.settings, "--run_dir", run, module="kit.killed_in_save"
        )
        with Command(arguments, output=tmp_path / "output") as command:
            assert command.wait() != 0, f"survived {point}"
            assert status(run)["status"] == "running", command.text[-3000:]
    with Command(torchrun(mode.ranks[-1], *mode.settings, "--run_dir", run), output=tmp_path / "output") as command:
        assert command.wait() == 0, command.text[-3000:]
    steps = [attempt["step"] for attempt in attempts(run, "started")]
    assert steps == sorted(steps)
    assert steps[-1] >= 80
    assert_same_bits(run, reference)


@pytest.mark.timeout(240)
def test_a_save_in_progress_survives_the_loss_of_a_rank(tmp_path: Path) -> None:
    """Rank 1 is killed while rank 0 writes the run's first checkpoint: rank 0 finishes it."""
    run = tmp_path / "run"
    arguments = torchrun(2, *SETTINGS, *SLOW, "--run_dir", run, module="kit.slow_save")
    with Command(arguments, output=tmp_path / "output") as command:
        command.wait_for(lambda: any(run.glob("checkpoints/.writing-*/manifest.json")), seconds=100, what="a save")
        assert not has_saved(run)
        [first] = attempts(run, "started")  # by rank 0
        kill(next(pid for pid in command.ranks() if pid != first["pid"]))
        assert command.wait() != 0
        found = status(run)
        assert (found["status"], found["exit_code"]) == ("failed", 1), command.text[-3000:]
        assert found["saved_step"] == 4
        assert any(words in found["reason"] for words in ("has died", "no heartbeat", "lost")), found
    assert has_saved(run)
