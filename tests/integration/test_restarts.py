"""torchrun's own restarts: a killed worker is replaced, the run goes on by itself and ends with the same bits."""

import random
import time
from pathlib import Path

import pytest

from integration.commands import Command, assert_same_bits, attempts, kill, status, torchrun

SETTINGS = ("configs/debug.toml", "--epochs", 12, "--checkpoint.every_steps", 4, "--threads", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    with Command(torchrun(2, *SETTINGS, "--run_dir", run), output=run.parent / "output") as command:
        assert command.wait() == 0, command.text
    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_with_max_restarts_killed_workers_are_replaced(reference: Path, tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_elastic_run_loses_an_agent_and_goes_on_alone_with_the_same_bits(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    port = 29000 + random.randrange(900)
    options = (
        "--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test",
        "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3", "--monitor-interval=0.1",
    )  # fmt: skip
    arguments = torchrun(1, *SETTINGS, "--run_dir", run, options=options)
    with (
        Command(arguments, output=tmp_path / "first") as first,
        Command(arguments, output=tmp_path / "second") as second,
    ):
        first.wait_for(lambda: attempts(run, "started"), what="the start of both")
        first.wait_for(lambda: status(run)["step"] >= 4, what="a save")
        assert status(run)["world_size"] == 2
        # The agent that does not host the rendezvous dies with its rank: a lost node.
        host, lost = (first, second) if str(port) in _listening(first.process.pid) else (second, first)
        kill(lost.process.pid, *lost.ranks())
        host.wait_for(lambda: len(attempts(run, "started")) > 1, what="the start alone")
        assert status(run)["world_size"] == 1
        assert attempts(run, "started")[-1]["step"] > 0
        assert host.wait(200) == 0, host.text[-5000:]
    assert_same_bits(run, reference)


def _listening(pid: int) -> str:
    """The ports that a process listens on, as text."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(link.readlink()))
        except OSError:
            continue
    ports = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.append(str(int(fields[1].rpartition(":")[2], 16)))
    return " ".join(ports)
