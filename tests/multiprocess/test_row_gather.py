"""The gather through shared memory does what the process group's does, whatever the ranks' pace, and tells of a dead peer."""

import errno
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit.ranks import in_group, leave, run_ranks
from torch import Tensor

from distributed.comm import collectives, shared_memory
from distributed.comm.all_gather import AllGather, SharedMemoryAllGather, open_all_gather, process_group_all_gather

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
EXCHANGES = 600
SLOT_BYTES = 64 * 1024


def rows_of(seed: int, exchange: int, rank: int) -> Tensor:
    """A row whose length and type all ranks agree on, with content of the rank's own: any bits, also those of NaN."""
    shared = random.Random(f"{seed} {exchange}")
    dtype, length = shared.choice(DTYPES), shared.choice((1, 3, 64, 129, 257, 1000))
    own = torch.Generator().manual_seed(1000 * exchange + rank)
    return torch.randint(0, 256, (length * dtype.itemsize,), generator=own, dtype=torch.uint8).view(dtype)


def bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("distributed-*")}


def left_behind(before: set[str]) -> set[str]:
    """Files that stay; another run on this machine has one for a moment too."""
    new, deadline = files() - before, time.monotonic() + 10
    while new and time.monotonic() < deadline:
        time.sleep(0.01)
        new &= files()
    return new


@in_group
def exchange_rows(seed: int) -> dict[str, Any]:
    rank, world_size = collectives.rank(), collectives.world_size()
    before = files()
    dist.barrier()
    gather = open_all_gather(CPU, timeout_seconds=30)
    own_pace = random.Random(rank)
    wrong = []
    for exchange in range(EXCHANGES):
        if own_pace.random() < 0.03:
            time.sleep(own_pace.choice((0.0002, 0.001, 0.008)))
        expected = torch.stack([rows_of(seed, exchange, peer) for peer in range(world_size)])
        if not torch.equal(bits(gather(rows_of(seed, exchange, rank))), bits(expected)):
            wrong.append(exchange)
    by_group = [
        torch.equal(bits(process_group_all_gather(row)), bits(gather(row)))
        for row in (rows_of(seed, exchange, rank) for exchange in range(60))
    ]
    # The first of these fills a slot to its last byte, the second is one number too long for it.
    kept, lengths = [], (SLOT_BYTES // 8, SLOT_BYTES // 8 + 1, 3, 50_000, 1, SLOT_BYTES // 8)
    for length in lengths:
        rows = gather(torch.arange(length, dtype=torch.float64) + 1e6 * rank)
        kept.append((rows, torch.arange(length, dtype=torch.float64) + 1e6 * torch.arange(world_size)[:, None]))
    started = time.monotonic()
    if rank == 0:
        time.sleep(1.0)
    late = gather(torch.tensor([rank]))
    waited = time.monotonic() - started
    dist.barrier()
    return {
        "kind": type(gather),
        "wrong": wrong,
        "by group": by_group,
        "long": [torch.equal(rows, expected) for rows, expected in kept],
        "late": (late.flatten().tolist(), waited),
        "left behind": left_behind(before),
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shared_memory_gathers_what_the_process_group_gathers_at_any_pace(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(exchange_rows, world_size, 7)):
        assert found["kind"] is SharedMemoryAllGather
        assert found["wrong"] == [], f"rank {rank}: exchanges that brought other rows than were sent"
        assert found["by group"] == [True] * 60
        assert found["long"] == [True] * 6, "rows that fill a slot, are too long for it, or come after such"
        rows, waited = found["late"]
        assert rows == list(range(world_size))
        assert waited > 0.9, "a rank did not wait for one that came late"
        assert found["left behind"] == set()


@in_group
def lose_a_peer(loser: int) -> tuple[str, float] | None:
    gather = open_all_gather(CPU, timeout_seconds=30)
    for _ in range(5):
        gather(torch.ones(64))
    if collectives.rank() == loser:
        leave()
    return failure_of(gather)


def failure_of(gather: AllGather) -> tuple[str, float]:
    """What the next exchange says, and after how many seconds."""
    start = time.monotonic()
    try:
        gather(torch.ones(64))
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", time.monotonic() - start


@pytest.mark.timeout(120)
@pytest.mark.parametrize("loser", [1, 2])
def test_a_dead_peer_is_told_within_two_seconds(loser: int) -> None:
    found = run_ranks(lose_a_peer, 3, loser)
    assert found.pop(loser) is None
    for message, seconds in found:
        assert re.search(rf"closed by peer: rank {loser}, process \d+ on \S+, has died", message)
        assert seconds < 2


@in_group
def outwait_a_peer() -> tuple[str, float] | None:
    gather = open_all_gather(CPU, timeout_seconds=0.5)
    gather(torch.ones(64))
    found = None if collectives.rank() == 1 else failure_of(gather)
    dist.barrier()  # until then rank 1 lives and says nothing
    return found


@pytest.mark.timeout(120)
def test_a_living_peer_that_never_comes_is_given_up_after_the_timeout() -> None:
    found = run_ranks(outwait_a_peer, 2)
    assert found[1] is None
    message, seconds = found[0]
    assert "timed out waiting" in message
    assert "rank 1" in message
    assert 0.5 <= seconds < 3


def no_such_file(path: str, *_: Any, **__: Any) -> None:
    raise FileNotFoundError(path)


class Full:
    """An operating system without room for another file's content."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def posix_fallocate(self, *_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")


APART: dict[str, tuple[int, dict[str, Any]]] = {
    "another machine": (1, {"machine": lambda: "elsewhere"}),
    "no file": (1, {"open": no_such_file}),
    "no room": (0, {"os": Full()}),
}
"""The rank to which it happens, and what it finds in place of the usual."""


@in_group
def open_apart(how: str) -> tuple[str, list[list[float]], set[str]]:
    """Rank 1 is on another host, or in a container that is named like rank 0's and does not see its file; or rank 0's has
    little shared memory."""
    before = files()
    dist.barrier()
    rank, changed = APART[how]
    if collectives.rank() == rank:
        vars(shared_memory).update(changed)
    gather = open_all_gather(CPU, timeout_seconds=30)
    rows = gather(torch.tensor([1.0 + collectives.rank()])).tolist()
    dist.barrier()
    return getattr(gather, "__name__", "shared memory"), rows, left_behind(before)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", list(APART))
def test_ranks_that_share_no_memory_gather_by_process_group(how: str) -> None:
    assert run_ranks(open_apart, 2, how) == [("gather_by_process_group", [[1.0], [2.0]], set())] * 2
