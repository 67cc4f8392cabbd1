"""Shards carried by a few threads: all of them meet, once each; a failure comes out; nothing is left on a thread."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.exact.shard_executor import ShardExecutor

CPU = torch.device("cpu")
MEETINGS = 5
EVERY_SIZE = [(shards, lanes) for shards in range(1, 9) for lanes in range(1, 5)]
pytestmark = pytest.mark.timeout(60)


class Gather:
    """Alone: the rows of this rank are all there are. Remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def __call__(self, rows: list[Tensor]) -> Tensor:
        gathered = torch.stack(rows)
        self.calls.append(gathered[:, 0].tolist())
        return gathered


def lanes_of(shards: int, lanes: int, gather: Callable[[list[Tensor]], Tensor] | None = None) -> ShardExecutor:
    return ShardExecutor(shards, lanes=lanes, gather=gather or Gather(), device=CPU)


@pytest.mark.parametrize(("shards", "lanes"), EVERY_SIZE)
def test_all_shards_meet_as_often_as_they_ask_and_results_come_in_their_order(shards: int, lanes: int) -> None:
    gather, combined = Gather(), []
    together = lanes_of(shards, lanes, gather)

    def compute(shard: int) -> tuple[int, list[Any], int]:
        def combine(rows: Tensor) -> tuple[object, float]:
            combined.append(shard)
            return object(), float(rows.sum())

        seen = []
        for meeting in range(MEETINGS):
            time.sleep(0.0003 * (shard % 3 == meeting % 3))  # another comes last each time
            seen.append(together.meet(shard, torch.tensor([100.0 * meeting + shard]), combine))
        return shard, seen, threading.get_ident()

    for run in range(3):
        results = together.run(compute)
        assert [shard for shard, _, _ in results] == list(range(shards))
        for meeting in range(MEETINGS):
            outcomes = [seen[meeting] for _, seen, _ in results]
            assert all(outcome is outcomes[0] for outcome in outcomes), "one outcome for everybody"
            assert outcomes[0][1] == sum(100.0 * meeting + shard for shard in range(shards))
        assert len(combined) == len(gather.calls) == (run + 1) * MEETINGS, "once a meeting"
        assert len({thread for _, _, thread in results}) == min(shards, lanes)
    assert gather.calls == [[100.0 * meeting + shard for shard in range(shards)] for meeting in range(MEETINGS)] * 3


def test_shards_that_never_meet_are_run_too() -> None:
    gather = Gather()
    assert lanes_of(5, 2, gather).run(lambda shard: shard**2) == [0, 1, 4, 9, 16]
    assert gather.calls == []


def test_a_result_may_be_none() -> None:
    assert lanes_of(3, 2).run(lambda shard: None) == [None] * 3


def test_meetings_may_come_at_any_depth_of_calls() -> None:
    together = lanes_of(4, 2)

    def deep(shard: int, depth: int) -> float:
        if depth:
            return deep(shard, depth - 1)
        return sum(together.meet(shard, torch.ones(1), lambda rows: float(rows.sum())) for _ in range(3))

    assert together.run(lambda shard: deep(shard, 50 * shard)) == [12.0] * 4


class Stumbled(Exception):
    pass


def stumbling(together: ShardExecutor, who: int, meetings: int) -> Callable[[int], int]:
    """A computation in which one shard raises after so many meetings."""

    def compute(shard: int) -> int:
        for meeting in range(MEETINGS + 1):
            if shard == who and meeting == meetings:
                raise Stumbled(who)
            if meeting < MEETINGS:
                together.meet(shard, torch.tensor([float(shard)]), lambda rows: rows.sum())
        return shard

    return compute


@pytest.mark.parametrize("meetings", [0, 2, MEETINGS])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_what_a_shard_raises_comes_out_and_the_lanes_can_be_used_again(lanes: int, meetings: int) -> None:
    together = lanes_of(6, lanes)
    whole = stumbling(together, -1, 0)
    for who in range(6):
        with pytest.raises(Stumbled) as caught:
            together.run(stumbling(together, who, meetings))
        assert caught.value.args == (who,)
        assert together.run(whole) == list(range(6))


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_where_all_shards_raise_one_of_their_exceptions_comes_out(lanes: int) -> None:
    together = lanes_of(4, lanes)

    def compute(shard: int) -> None:
        together.meet(shard, torch.ones(1), lambda rows: rows)
        raise Stumbled(shard)

    for _ in range(5):
        with pytest.raises(Stumbled):
            together.run(compute)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("where", ["gather", "combine"])
def test_what_the_exchange_raises_comes_out_and_the_lanes_can_be_used_again(lanes: int, where: str) -> None:
    lost = [where]

    def gather(rows: list[Tensor]) -> Tensor:
        if lost == ["gather"]:
            raise RuntimeError("rank 1 has died")
        return torch.stack(rows)

    def combine(rows: Tensor) -> float:
        if lost == ["combine"]:
            raise RuntimeError("rank 1 has died")
        return float(rows.sum())

    together = lanes_of(4, lanes, gather)

    def compute(shard: int) -> float:
        return together.meet(shard, torch.ones(1), combine)

    with pytest.raises(RuntimeError, match="rank 1 has died"):
        together.run(compute)
    lost.clear()
    assert together.run(compute) == [4.0] * 4


def autocast_here() -> tuple[bool, int]:
    """Whether this thread is in autocast, and inside how many of its contexts."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), nesting


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_autocast_is_a_shards_own(lanes: int) -> None:
    together = lanes_of(6, lanes)
    wrong: list[str] = []

    def combine(rows: Tensor) -> None:
        if torch.is_autocast_enabled("cpu"):
            wrong.append("the exchange is in autocast")

    def compute(shard: int) -> torch.dtype:
        dtypes = []
        for meeting in range(4):
            inside = (shard + meeting) % 2 == 0
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                together.meet(shard, torch.ones(1), combine)
                if torch.is_autocast_enabled("cpu") != inside:
                    wrong.append(f"shard {shard}, meeting {meeting}, inside")
                dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
                if dtypes[-1] != (torch.bfloat16 if inside else torch.float32):
                    wrong.append(f"shard {shard}, meeting {meeting}: {dtypes[-1]}")
            together.meet(shard, torch.ones(1), combine)
            if torch.is_autocast_enabled("cpu"):
                wrong.append(f"shard {shard}, meeting {meeting}, behind")
        return dtypes

    together.run(compute)
    assert wrong == []
    assert autocast_here() == (False, 0)
    assert together.run(lambda shard: autocast_here()) == [(False, 0)] * 6


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_nor_does_it_remain_where_a_shard_raised_inside_it(lanes: int) -> None:
    together = lanes_of(6, lanes)

    def compute(shard: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            together.meet(shard, torch.ones(1), lambda rows: None)
            if shard == 4:
                raise Stumbled
            together.meet(shard, torch.ones(1), lambda rows: None)

    for _ in range(3):
        with pytest.raises(Stumbled):
            together.run(compute)
    gc.collect()  # the others are given up where they stood: they end when nothing refers to them
    assert not autocast_here()[0]
    assert [enabled for enabled, _ in together.run(lambda shard: autocast_here())] == [False] * 6


@pytest.fixture
def _many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_many_threads")
def test_helpers_compute_with_one_thread_each() -> None:
    assert lanes_of(4, 4).run(lambda shard: torch.get_num_threads())[1:] == [1] * 3


def threads_left_by(use: Callable[[ShardExecutor], object]) -> set[threading.Thread]:
    """Those that lanes started, and that live on though nothing refers to the lanes any more."""
    before = set(threading.enumerate())
    lanes = lanes_of(6, 3)
    use(lanes)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del lanes
    gc.collect()
    deadline = time.monotonic() + 5
    while (left := started & set(threading.enumerate())) and time.monotonic() < deadline:
        time.sleep(0.002)
    return left


def test_threads_end_when_nothing_refers_to_the_lanes() -> None:
    assert threads_left_by(lambda lanes: lanes.run(stumbling(lanes, -1, 0))) == set()


def test_nor_do_they_stay_where_a_shard_raised() -> None:
    def fail(lanes: ShardExecutor) -> None:
        with pytest.raises(Stumbled):
            lanes.run(stumbling(lanes, 4, 2))

    assert threads_left_by(fail) == set()
