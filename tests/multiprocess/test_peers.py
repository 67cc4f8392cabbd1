"""A rank that fails, dies or freezes is named by the others, which exit with its exit code."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from kit.ranks import RankFailed, leave, run_ranks

from distributed.comm import collectives
from distributed.comm.peers import notify_waiting_peers
from distributed.comm.process_group import process_group
from distributed.errors import ExitCode, InputError, NotFiniteError, PeerError, StorageError
from distributed.topology import Topology

pytestmark = pytest.mark.timeout(200)  # the first test waits for the fork server to start
CPU = torch.device("cpu")
ERRORS: dict[str, Callable[[], Exception]] = {
    "storage": lambda: StorageError("the disk is full"),
    "input": lambda: InputError("one thing", "and another"),
    "not finite": lambda: NotFiniteError("the loss was not finite at step 3"),
    "a bug": lambda: ValueError("no such number"),
}


def end_of_rank_1(how: str) -> tuple[str, int, float]:
    """Error message and exit code of rank 0 in a collective when rank 1 ends, and how long it took in seconds."""
    pids, begin = [0, 0], 0.0
    try:
        with process_group(Topology.from_environment(), CPU, timeout_seconds=3):
            pids, begin = collectives.gather_objects(os.getpid()), time.monotonic()
            if collectives.rank() == 1:
                _end(how)
            dist.all_reduce(torch.zeros(1))
    except PeerError as error:
        if how == "freeze":
            os.kill(pids[1], signal.SIGCONT)
        return str(error).replace(str(pids[1]), "PID"), int(error.exit_code), time.monotonic() - begin
    except Exception:
        leave()
    raise AssertionError("no error was raised")


def _end(how: str) -> None:
    if how in ERRORS:
        raise ERRORS[how]()
    if how == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    leave()


@pytest.mark.parametrize(
    ("how", "expected", "code"),
    [
        ("storage", "rank 1: the disk is full", ExitCode.STORAGE),
        ("input", "rank 1: one thing; and another", ExitCode.BAD_INPUT),
        ("not finite", "rank 1: the loss was not finite at step 3", ExitCode.NOT_FINITE),
        ("a bug", "rank 1: ValueError: no such number", ExitCode.FAILED),
        ("kill", "rank 1 (process PID on ", ExitCode.FAILED),
        ("freeze", "rank 1 (process PID on ", ExitCode.FAILED),
    ],
)
def test_failed_rank_is_named(how: str, expected: str, code: ExitCode) -> None:
    message, found, seconds = run_ranks(end_of_rank_1, 2, how, timeout_seconds=180)[0]
    assert message.startswith(expected)
    assert found == code
    assert seconds < (8 if how == "freeze" else 4)
    assert ("no heartbeat" in message) == (how in ("kill", "freeze"))


def wait_for_rank_1(how: str) -> None:
    """Rank 0 waits in C++ for a rank that has failed but is still running, so its sockets stay open."""
    topology = replace(Topology.from_environment(), local_rank=0, local_world_size=1)  # no launcher ends the other rank
    if topology.rank == 1 and how == "before the rendezvous":
        notify_waiting_peers(topology, ExitCode.BAD_INPUT, "a damaged file")
        time.sleep(30)
    with suppress(StorageError), process_group(topology, CPU, timeout_seconds=30):
        if topology.rank == 0:
            dist.distributed_c10d._get_default_store().get("never set")
        raise StorageError("the disk is full")
    time.sleep(30)


@pytest.mark.parametrize(("how", "code"), [("before the rendezvous", 2), ("in the group", 4)])
def test_rank_blocked_in_c_exits(how: str, code: int) -> None:
    with pytest.raises(RankFailed, match=f"^rank 0 of 2 failed:\nit ended with exit code {code} and no answer"):
        run_ranks(wait_for_rank_1, 2, how, timeout_seconds=20)


def leave_together() -> str:
    with process_group(Topology.from_environment(), CPU, timeout_seconds=30):
        dist.barrier()
    return "success"


def test_successful_exit_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(leave_together, 2) == ["success", "success"]
    assert "TCPStore" not in capfd.readouterr().err
