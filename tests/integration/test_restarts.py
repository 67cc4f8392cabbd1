"""torchrun's own restarts: a killed worker is replaced, the run resumes and ends with the same bits."""

import random
import time
from pathlib import Path

import pytest
from kit.cluster import free_ports
from kit.commands import NARROW, Command, assert_same_bits, attempts, has_saved, kill, status, torchrun
from kit.slow_sink import SLOW

SETTINGS = (
    "configs/debug.toml", "--epochs", 12, "--checkpoint.every_steps", 4, "--logging.every_steps", 2, *NARROW,
    "--threads", 1, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    with Command(torchrun(2, *SETTINGS, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_max_restarts_replaces_killed_workers(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--standalone", "--max-restarts=3", "--monitor-interval=0.1")
    with Command(torchrun(2, *SETTINGS, "--run_dir", run, options=options), output=tmp_path / "output") as command:
        for restart in range(3):
            command.wait_for(lambda: len(attempts(run, "started")) > restart, what="an attempt")  # noqa: B023
            time.sleep(0.5)
            kill(random.Random(restart).choice(command.ranks()))
        assert command.wait() == 0, command.text[-5000:]
    assert len(attempts(run, "started")) == 4
    assert_same_bits(run, reference)


def elastic(port: int, run: Path, *, node: int = 1, more: tuple[object, ...] = ()) -> list[str]:
    """Return the README's elastic command on a node with address 127.0.0.NODE; the lowest address gets rank 0."""
    options = (
        "--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--local-addr=127.0.0.{node}", "--monitor-interval=0.1",
        "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3",
    )  # fmt: skip
    return torchrun(1, *SETTINGS, *SLOW, "--run_dir", run, *more, options=options)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_joining_and_leaving_nodes_keep_the_bits(reference: Path, tmp_path: Path) -> None:
    """A second node joins during the run and takes over rank 0, is lost, and is replaced by a third."""
    run, [port] = tmp_path / "run", free_ports(1)

    def started(first: Command, number: int, world_size: int) -> None:
        first.wait_for(lambda: len(attempts(run, "started")) == number, what=f"attempt {number}")
        assert (status(run)["world_size"], len(attempts(run, "started"))) == (world_size, number), first.text[-4000:]

    with Command(elastic(port, run, node=2), output=tmp_path / "first") as first:
        started(first, 1, world_size=1)
        first.wait_for(lambda: has_saved(run), what="a save")
        with Command(elastic(port, run, node=1), output=tmp_path / "second") as second:
            started(first, 2, world_size=2)
            kill(second.process.pid, *second.ranks())
            started(first, 3, world_size=1)
        with Command(elastic(port, run, node=3), output=tmp_path / "third") as third:
            started(first, 4, world_size=2)
            assert (first.wait(), third.wait()) == (0, 0), first.text[-5000:]
    assert attempts(run, "started")[-1]["step"] > 0
    assert_same_bits(run, reference)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_foreign_job_at_the_endpoint_is_refused(reference: Path, tmp_path: Path) -> None:
    """Without --rdzv-id torchrun mistakes it for a node of the first job, which continues and keeps its bits."""
    run, other, [port] = tmp_path / "run", tmp_path / "other", free_ports(1)
    with Command(elastic(port, run, node=2), output=tmp_path / "first") as first:
        first.wait_for(lambda: attempts(run, "started"), what="the first job")
        with Command(elastic(port, other, more=("--seed", 7)), output=tmp_path / "second") as second:
            second.wait()
        errors = [line for line in second.text.splitlines() if " ERROR " in line]
        assert len(errors) == 1, second.text
        assert "give each job its own --rdzv-id" in errors[0]
        assert not other.exists()
        assert first.wait() == 0, first.text[-5000:]
    assert_same_bits(run, reference)
