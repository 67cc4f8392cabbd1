"""The shared-memory all-gather matches the process group's with any timing, and detects dead peers."""

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
from kit.speed import slowness
from torch import Tensor

from distributed.comm import collectives, shared_memory
from distributed.comm.all_gather import AllGather, SharedMemoryAllGather, open_all_gather, process_group_all_gather
from distributed.errors import ExitCode
from distributed.process import exits

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
GATHERS = 600
SLOT_BYTES = 64 * 1024


def row_of(seed: int, gather: int, rank: int) -> Tensor:
    """Return a row of the same random length and dtype on all ranks, with random bits, including NaN, that differ per rank."""
    shared = random.Random(f"{seed} {gather}")
    dtype, length = shared.choice(DTYPES), shared.choice((1, 3, 64, 129, 257, 1000))
    own = torch.Generator().manual_seed(1000 * gather + rank)
    return torch.randint(0, 256, (length * dtype.itemsize,), generator=own, dtype=torch.uint8).view(dtype)


def bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("distributed-*")}


def left_behind(before: set[str]) -> set[str]:
    """Return new files that persist. Other runs on this machine create such files briefly, too."""
    new, deadline = files() - before, time.monotonic() + 10
    while new and time.monotonic() < deadline:
        time.sleep(0.01)
        new &= files()
    return new


@in_group
def gather_rows(seed: int) -> dict[str, Any]:
    rank, world_size = collectives.rank(), collectives.world_size()
    before = files()
    dist.barrier()
    gather = open_all_gather(CPU, timeout_seconds=30)
    timing = random.Random(rank)
    wrong = []
    for index in range(GATHERS):
        if timing.random() < 0.03:
            time.sleep(timing.choice((0.0002, 0.001, 0.008)))
        expected = torch.stack([row_of(seed, index, peer) for peer in range(world_size)])
        if not torch.equal(bits(gather(row_of(seed, index, rank))), bits(expected)):
            wrong.append(index)
    like_group = [
        torch.equal(bits(process_group_all_gather(row)), bits(gather(row)))
        for row in (row_of(seed, index, rank) for index in range(60))
    ]
    # The first row fills a slot exactly, the second is one element too long for it.
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
        "like group": like_group,
        "long": [torch.equal(rows, expected) for rows, expected in kept],
        "late": (late.flatten().tolist(), waited),
        "left behind": left_behind(before),
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shared_memory_matches_the_process_group(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(gather_rows, world_size, 7)):
        assert found["kind"] is SharedMemoryAllGather
        assert found["wrong"] == [], f"rank {rank}: gathers that returned wrong rows"
        assert found["like group"] == [True] * 60
        assert found["long"] == [True] * 6, "rows that fill a slot, are too long for it, or follow such rows"
        rows, waited = found["late"]
        assert rows == list(range(world_size))
        assert waited > 0.9, "a rank did not wait for a late one"
        assert found["left behind"] == set()


@in_group
def links_while_allocating() -> list[int]:
    """Return how many names the file of the shared memory has while its memory is allocated."""
    found, allocate = list[int](), os.posix_fallocate

    def watched(handle: int, offset: int, size: int) -> None:
        found.append(os.fstat(handle).st_nlink)
        allocate(handle, offset, size)

    os.posix_fallocate = watched
    try:
        memory = shared_memory.open_shared_memory(2**20, CPU)
    finally:
        os.posix_fallocate = allocate
    assert memory is not None
    assert memory.bytes[:] == bytes(2**20)
    return found


def test_memory_has_no_name_when_it_is_allocated() -> None:
    """So the kernel frees it with the last process, even a killed one."""
    assert run_ranks(links_while_allocating, 2) == [[0], []]


@in_group
def lose_a_peer(loser: int) -> tuple[str, float] | None:
    gather = open_all_gather(CPU, timeout_seconds=30)
    for _ in range(5):
        gather(torch.ones(64))
    if collectives.rank() == loser:
        leave()
    return failure_of(gather)


def failure_of(gather: AllGather) -> tuple[str, float]:
    """Return the error message of the next gather, and after how many seconds it was raised."""
    start = time.monotonic()
    try:
        gather(torch.ones(64))
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing was raised", time.monotonic() - start


@pytest.mark.timeout(120)
@pytest.mark.parametrize("loser", [1, 2])
def test_a_dead_peer_is_detected_within_two_seconds(loser: int) -> None:
    found = run_ranks(lose_a_peer, 3, loser)
    assert found.pop(loser) is None
    for message, seconds in found:
        assert re.search(rf"closed by peer: rank {loser}, process \d+ on \S+, has died", message)
        assert seconds < 2 * slowness()


@in_group
def wait_for_a_silent_peer() -> tuple[str, float] | None:
    gather = open_all_gather(CPU, timeout_seconds=0.5)
    gather(torch.ones(64))
    found = None if collectives.rank() == 1 else failure_of(gather)
    dist.barrier()  # until then rank 1 is alive and silent
    return found


@pytest.mark.timeout(120)
def test_waiting_for_a_silent_peer_times_out() -> None:
    found = run_ranks(wait_for_a_silent_peer, 2)
    assert found[1] is None
    message, seconds = found[0]
    assert "timed out waiting" in message
    assert "rank 1" in message
    assert 0.5 <= seconds < 3 * slowness()


def no_such_file(path: str, *_: Any, **__: Any) -> None:
    raise FileNotFoundError(path)


class FullDisk:
    """The `os` module, without space for another file's content."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def posix_fallocate(self, *_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")


NOT_SHARED: dict[str, tuple[int, dict[str, Any]]] = {
    "another machine": (1, {"boot_id": lambda: "elsewhere"}),
    "no file": (1, {"open": no_such_file}),
    "no room": (0, {"os": FullDisk()}),
}
"""The affected rank, and names to replace in `shared_memory`."""


@in_group
def open_without_shared_memory(how: str) -> tuple[str, list[list[float]], set[str]]:
    """Rank 1 is on another host, or in a container with the same host name that does not see rank 0's file; or rank 0 has
    too little shared memory."""
    before = files()
    dist.barrier()
    rank, changed = NOT_SHARED[how]
    if collectives.rank() == rank:
        vars(shared_memory).update(changed)
    gather = open_all_gather(CPU, timeout_seconds=30)
    rows = gather(torch.tensor([1.0 + collectives.rank()])).tolist()
    dist.barrier()
    return getattr(gather, "__name__", "shared memory"), rows, left_behind(before)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", list(NOT_SHARED))
def test_ranks_without_shared_memory_use_the_process_group(how: str) -> None:
    assert run_ranks(open_without_shared_memory, 2, how) == [("process_group_all_gather", [[1.0], [2.0]], set())] * 2


def test_an_immediate_exit_leaves_no_shared_memory(monkeypatch):
    """os._exit does not run `finally`: the file would stay until a reboot."""
    made, exists, create = [], [], shared_memory._create_file

    def noted(created):
        made.append(created)
        return create(created)

    def exit_meanwhile(value):
        if isinstance(value, bool) and not exists:  # the rank has opened the file
            exists.append(Path(made[0][0]).exists())
            for hook in list(exits._hooks):
                hook(exits.Exit(ExitCode.STOPPED, "SIGINT"))
            exists.append(Path(made[0][0]).exists())
        return [value]

    monkeypatch.setattr(shared_memory, "_create_file", noted)
    monkeypatch.setattr(collectives, "gather_objects", exit_meanwhile)
    hooks = list(exits._hooks)
    assert shared_memory.open_shared_memory(64, CPU)
    assert (exists, exits._hooks) == ([True, False], hooks)
