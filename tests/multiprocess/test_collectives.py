"""Collectives over ranks, and without a process group in a single process."""

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kit.ranks import RankFailed, in_group, leave, run_ranks

from distributed.comm import collectives
from distributed.comm.delayed_max import DelayedMax, ProcessGroupMax, open_delayed_max
from distributed.comm.process_group import process_group
from distributed.errors import InputError, StorageError
from distributed.topology import Topology

EXCHANGES = 100


def fails_on(rank: int, error: Exception) -> Callable[[], str]:
    """Return work that fails on one rank."""

    def work() -> str:
        if collectives.rank() == rank:
            raise error
        return f"done by {collectives.rank()}"

    return work


def outcome(do: Callable[[Callable[[], str]], str], work: Callable[[], str]) -> str:
    try:
        return do(work)
    except (InputError, StorageError) as error:
        return f"{type(error).__name__} {error.exit_code:d}: {error}"


def exchange_flags(late: DelayedMax) -> tuple[str, list[list[int]]]:
    """Return the kind of exchange and what each of its calls returned, over many steps with late ranks."""
    rank, timing, returned = collectives.rank(), random.Random(collectives.rank()), []
    for call in range(EXCHANGES):
        if timing.random() < 0.05:
            time.sleep(timing.choice((0.0002, 0.003)))
        returned.append(late.exchange(int(rank == 1 and call == 1), 10 * call + rank))
    return type(late).__name__, [*returned, late.drain(), late.drain()]


@in_group
def try_everything() -> dict[str, Any]:
    rank = collectives.rank()
    delayed = [exchange_flags(late) for late in (open_delayed_max(2, timeout_seconds=30), ProcessGroupMax(2))]
    return {
        "rank and size": (rank, collectives.world_size()),
        "sum": collectives.sum_over_ranks_(torch.tensor([rank, 2**60 + rank])).tolist(),
        "max": collectives.max_over_ranks_(torch.tensor([rank, -rank, 2 * (rank == 1)])).tolist(),
        "from main": collectives.broadcast_object({"rank": rank, "path": None}),
        "nothing from main": collectives.broadcast_object(None if rank == 0 else "something"),
        "gathered": collectives.gather_objects(("rank", rank, "x" * (1000 * rank))),
        "decided": [outcome(collectives.run_on_main, fails_on(at, InputError("a", "b"))) for at in (-1, 0, 1)],
        "done": [outcome(collectives.run_on_all, fails_on(at, StorageError("full"))) for at in (-1, 0, 1)],
        "delayed": delayed,
    }


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(try_everything, request.param)


@pytest.mark.timeout(120)
def test_ranks_and_world_size(found: list[dict[str, Any]]) -> None:
    assert [rank["rank and size"] for rank in found] == [(rank, len(found)) for rank in range(len(found))]


@pytest.mark.timeout(120)
def test_result_or_error_of_rank_0_reaches_all_ranks(found: list[dict[str, Any]]) -> None:
    """The work is not run on the other ranks, so their errors do not occur."""
    assert [rank["decided"] for rank in found] == [["done by 0", "InputError 2: a\nb", "done by 0"]] * len(found)


@pytest.mark.timeout(120)
def test_first_error_of_any_rank_reaches_all_ranks(found: list[dict[str, Any]]) -> None:
    assert [rank["done"] for rank in found] == [
        [f"done by {place}", "StorageError 4: full", "StorageError 4: full"] for place in range(len(found))
    ]


@pytest.mark.timeout(120)
def test_integer_sums_are_exact(found: list[dict[str, Any]]) -> None:
    count, small = len(found), sum(range(len(found)))
    assert [rank["sum"] for rank in found] == [[small, count * 2**60 + small]] * count


@pytest.mark.timeout(120)
def test_maxima_are_elementwise(found: list[dict[str, Any]]) -> None:
    assert [rank["max"] for rank in found] == [[len(found) - 1, 0, 2]] * len(found)


@pytest.mark.timeout(120)
def test_every_rank_receives_rank_0s_value(found: list[dict[str, Any]]) -> None:
    assert [rank["from main"] for rank in found] == [{"rank": 0, "path": None}] * len(found)
    assert [rank["nothing from main"] for rank in found] == [None] * len(found)


@pytest.mark.timeout(120)
def test_gathered_objects_are_in_rank_order(found: list[dict[str, Any]]) -> None:
    expected = [("rank", rank, "x" * (1000 * rank)) for rank in range(len(found))]
    assert [rank["gathered"] for rank in found] == [expected] * len(found)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["SharedMemoryMax", "ProcessGroupMax"])
def test_delayed_max_returns_the_previous_calls_maxima(kind: str, found: list[dict[str, Any]]) -> None:
    last = len(found) - 1
    expected = [[0, 0], *([int(call == 1), 10 * call + last] for call in range(EXCHANGES)), [0, 0]]
    for rank in found:
        assert dict(rank["delayed"])[kind] == expected


def test_single_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    tensor, late, thing = torch.tensor([3, 4]), open_delayed_max(2, timeout_seconds=30), object()
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.sum_over_ranks_(tensor) is tensor
    assert collectives.max_over_ranks_(tensor) is tensor
    assert tensor.tolist() == [3, 4]
    assert collectives.broadcast_object(thing) is thing
    assert collectives.gather_objects(thing) == [thing]
    assert [late.exchange(1, 5), late.exchange(0, 6), late.drain(), late.drain()] == [[0, 0], [1, 5], [0, 6], [0, 0]]


def fail_in_rank_1(how: str) -> str:
    if os.environ["RANK"] == "1":
        if how == "raise":
            raise ValueError("as requested")
        if how == "die":
            os._exit(3)
        if how == "leave":
            leave()
        time.sleep(60)
    return how


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"(?s)rank 1 of 2 failed:.*fail_in_rank_1.*ValueError: as requested"),
        ("die", "rank 1 of 2 failed:\nit ended with exit code 3"),
        ("hang", r"no answer from rank (0, )?1 of 2 within \d+ s"),
    ],
)
def test_run_ranks_names_the_failed_rank_and_error(how: str, message: str) -> None:
    with pytest.raises(RankFailed, match=message):
        run_ranks(fail_in_rank_1, 2, how, timeout_seconds=5 if how == "hang" else 60)


@pytest.mark.timeout(120)
def test_run_ranks_returns_none_for_a_rank_that_left() -> None:
    assert run_ranks(fail_in_rank_1, 2, "leave") == ["leave", None]


def wait_for_a_silent_rank() -> float:
    """Return how long rank 0 waited for rank 1 in a group created later, in seconds; -1 on rank 1."""
    with process_group(Topology.from_environment(), torch.device("cpu"), timeout_seconds=2):
        group = dist.new_group()
        if dist.get_rank() == 1:
            time.sleep(10)
            return -1.0
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="Timed out waiting 2000ms"):
            dist.all_reduce(torch.zeros(1), group=group)
        return time.monotonic() - begin


@pytest.mark.timeout(120)
def test_timeout_applies_to_groups_created_later() -> None:
    """FSDP2, DeepSpeed and exact mode create such groups; torch would wait for 30 minutes there."""
    assert 2 <= run_ranks(wait_for_a_silent_rank, 2)[0] < 8
