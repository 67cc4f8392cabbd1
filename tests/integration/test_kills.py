"""Whatever is killed, whenever: the run that goes on ends with the bits of the undisturbed one."""

import random
import signal
import time
from pathlib import Path

import pytest

from integration.commands import Command, assert_same_bits, attempts, kill, status, torchrun
from integration.killed_in_save import POINTS

SETTINGS = (
    "configs/debug.toml", "--epochs", 6, "--data.train_samples", 700, "--checkpoint.every_steps", 4,
    "--data.test_samples", 60, "--accumulation", 2, "--threads", 1,
)  # fmt: skip
KINDS = ("kill -9 a rank", "kill -9 the agent", "kill -9 everything", "SIGTERM to the agent", "SIGTERM to a rank")


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Command(torchrun(request.param, *SETTINGS, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return request.param, run


def strike(command: Command, kind: str, dice: random.Random) -> None:
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
def test_ten_strikes_at_random_moments_leave_the_bits_alone(undisturbed: tuple[int, Path], tmp_path: Path) -> None:
    ranks, reference = undisturbed
    run, dice, strikes = tmp_path / "run", random.Random(ranks), 0
    last_step = status(reference)["step"]
    for attempt in range(30):
        with Command(torchrun(ranks, *SETTINGS, "--run_dir", run), output=tmp_path / "output") as command:
            begun = len(attempts(run, "started"))
            if strikes < 10:
                command.wait_for(lambda: len(attempts(run, "started")) > begun, what="the start")  # noqa: B023
                time.sleep(dice.uniform(0, 0.8))
                if command.process.poll() is None:
                    strike(command, KINDS[attempt % len(KINDS)], dice)
                    strikes += 1
            command.wait()
            if status(run).get("status") == "finished":
                break
            # What the agent left behind notices its death by itself, saves and goes.
    print(f"{strikes} strikes; attempts began at steps {[a['step'] for a in attempts(run, 'started')]} of {last_step}")
    assert strikes >= 8, "the run ended before it was hit often enough: make it longer"
    assert_same_bits(run, reference)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_kill_at_each_point_of_a_save_leaves_the_bits_alone(undisturbed: tuple[int, Path], tmp_path: Path) -> None:
    ranks, reference = undisturbed
    run = tmp_path / "run"
    for number, point in enumerate(POINTS):
        arguments = torchrun(
            ranks, point, 10 + 20 * number, *SETTINGS, "--run_dir", run, module="integration.killed_in_save"
        )
        with Command(arguments, output=tmp_path / "output") as command:
            assert command.wait() != 0, f"survived {point}"
            assert status(run)["status"] == "running", command.text[-3000:]
    with Command(torchrun(ranks, *SETTINGS, "--run_dir", run), output=tmp_path / "output") as command:
        assert command.wait() == 0, command.text[-3000:]
    begun = [attempt["step"] for attempt in attempts(run, "started")]
    assert begun == sorted(begun)
    assert begun[-1] >= 80
    assert_same_bits(run, reference)
