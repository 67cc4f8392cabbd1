"""Shards on a few worker threads: synchronization, errors, autocast per shard, and no threads left behind."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.errors import InputError
from distributed.exact.shard_executor import ShardExecutor

CPU = torch.device("cpu")
SYNCHRONIZATIONS = 5
EVERY_SIZE = [(shards, workers) for shards in range(1, 9) for workers in range(1, 5)]
pytestmark = pytest.mark.timeout(60)


class Gather:
    """Gathers for a single rank; records its arguments."""

    def __init__(self) -> None:
        self.calls: list[list[float]] = []

    def __call__(self, rows: list[Tensor]) -> Tensor:
        gathered = torch.stack(rows)
        self.calls.append(gathered[:, 0].tolist())
        return gathered


def executor_of(shards: int, workers: int, gather: Callable[[list[Tensor]], Tensor] | None = None) -> ShardExecutor:
    return ShardExecutor(shards, workers=workers, gather=gather or Gather(), device=CPU)


@pytest.mark.parametrize(("shards", "workers"), EVERY_SIZE)
def test_all_shards_synchronize_and_results_are_in_order(shards: int, workers: int) -> None:
    gather, reducing = Gather(), []
    executor = executor_of(shards, workers, gather)

    def compute(shard: int) -> tuple[int, list[Any], int]:
        def reduce_fn(rows: Tensor) -> tuple[object, float]:
            reducing.append(shard)
            return object(), float(rows.sum())

        seen = []
        for point in range(SYNCHRONIZATIONS):
            time.sleep(0.0003 * (shard % 3 == point % 3))  # a different shard arrives last each time
            seen.append(executor.all_gather_rows([torch.tensor([100.0 * point + shard])], reduce_fn))
        return shard, seen, threading.get_ident()

    for run in range(3):
        results = executor.run(compute)
        assert [shard for shard, _, _ in results] == list(range(shards))
        for point in range(SYNCHRONIZATIONS):
            reduced = [seen[point] for _, seen, _ in results]
            assert all(each is reduced[0] for each in reduced), "all shards share one result"
            assert reduced[0][1] == sum(100.0 * point + shard for shard in range(shards))
        assert len(reducing) == len(gather.calls) == (run + 1) * SYNCHRONIZATIONS, "once per synchronization point"
        assert len({thread for _, _, thread in results}) == min(shards, workers)
    per_run = [[100.0 * point + shard for shard in range(shards)] for point in range(SYNCHRONIZATIONS)]
    assert gather.calls == per_run * 3


def test_shards_need_not_synchronize() -> None:
    gather = Gather()
    assert executor_of(5, 2, gather).run(lambda shard: shard**2) == [0, 1, 4, 9, 16]
    assert gather.calls == []


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("fewer", [{0}, {0, 1}, {3}], ids=str)
def test_shards_that_synchronize_less_often_are_an_error(fewer: set[int], workers: int) -> None:
    """Otherwise old rows would be gathered again, or a worker would wait forever."""
    executor = executor_of(4, workers)

    def compute(shard: int, fewer: set[int]) -> int:
        for _ in range(2 - (shard in fewer)):
            executor.all_gather_rows([torch.ones(1)], lambda rows: rows)
        return shard

    with pytest.raises(InputError, match="was called for some shards of a batch only"):
        executor.run(lambda shard: compute(shard, fewer))
    assert executor.run(lambda shard: compute(shard, set())) == [0, 1, 2, 3]


def test_a_result_may_be_none() -> None:
    assert executor_of(3, 2).run(lambda shard: None) == [None] * 3


def test_synchronizing_at_different_call_depths() -> None:
    executor = executor_of(4, 2)

    def deep(shard: int, depth: int) -> float:
        if depth:
            return deep(shard, depth - 1)
        return sum(executor.all_gather_rows([torch.ones(1)], lambda rows: float(rows.sum())) for _ in range(3))

    assert executor.run(lambda shard: deep(shard, 50 * shard)) == [12.0] * 4


class ShardError(Exception):
    pass


def failing(executor: ShardExecutor, failing_shard: int, after: int) -> Callable[[int], int]:
    """Return a function in which one shard raises after `after` synchronization points."""

    def compute(shard: int) -> int:
        for point in range(SYNCHRONIZATIONS + 1):
            if shard == failing_shard and point == after:
                raise ShardError(failing_shard)
            if point < SYNCHRONIZATIONS:
                executor.all_gather_rows([torch.tensor([float(shard)])], lambda rows: rows.sum())
        return shard

    return compute


@pytest.mark.parametrize("after", [0, 2, SYNCHRONIZATIONS])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_executor_is_usable_after_a_shard_raised(workers: int, after: int) -> None:
    executor = executor_of(6, workers)
    succeeding = failing(executor, -1, 0)
    for failing_shard in range(6):
        with pytest.raises(ShardError) as caught:
            executor.run(failing(executor, failing_shard, after))
        assert caught.value.args == (failing_shard,)
        assert executor.run(succeeding) == list(range(6))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_one_exception_is_raised_if_all_shards_fail(workers: int) -> None:
    executor = executor_of(4, workers)

    def compute(shard: int) -> None:
        executor.all_gather_rows([torch.ones(1)], lambda rows: rows)
        raise ShardError(shard)

    for _ in range(5):
        with pytest.raises(ShardError):
            executor.run(compute)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("where", ["gather", "reduce_fn"])
def test_executor_is_usable_after_the_gather_raised(workers: int, where: str) -> None:
    lost = [where]

    def gather(rows: list[Tensor]) -> Tensor:
        if lost == ["gather"]:
            raise RuntimeError("rank 1 has died")
        return torch.stack(rows)

    def reduce_fn(rows: Tensor) -> float:
        if lost == ["reduce_fn"]:
            raise RuntimeError("rank 1 has died")
        return float(rows.sum())

    executor = executor_of(4, workers, gather)

    def compute(shard: int) -> float:
        return executor.all_gather_rows([torch.ones(1)], reduce_fn)

    with pytest.raises(RuntimeError, match="rank 1 has died"):
        executor.run(compute)
    lost.clear()
    assert executor.run(compute) == [4.0] * 4


def autocast_of_thread() -> tuple[bool, int]:
    """Return whether autocast is enabled in this thread, and how many autocast contexts are entered."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), nesting


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_shard_has_its_own_autocast(workers: int) -> None:
    executor = executor_of(6, workers)
    wrong: list[str] = []

    def reduce_fn(rows: Tensor) -> None:
        if torch.is_autocast_enabled("cpu"):
            wrong.append("reduce_fn runs in autocast")

    def compute(shard: int) -> torch.dtype:
        dtypes = []
        for point in range(4):
            enabled = (shard + point) % 2 == 0
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                executor.all_gather_rows([torch.ones(1)], reduce_fn)
                if torch.is_autocast_enabled("cpu") != enabled:
                    wrong.append(f"shard {shard}, point {point}, inside")
                dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
                if dtypes[-1] != (torch.bfloat16 if enabled else torch.float32):
                    wrong.append(f"shard {shard}, point {point}: {dtypes[-1]}")
            executor.all_gather_rows([torch.ones(1)], reduce_fn)
            if torch.is_autocast_enabled("cpu"):
                wrong.append(f"shard {shard}, point {point}, outside")
        return dtypes

    executor.run(compute)
    assert wrong == []
    assert autocast_of_thread() == (False, 0)
    assert executor.run(lambda shard: autocast_of_thread()) == [(False, 0)] * 6


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_autocast_ends_if_a_shard_raises_inside_it(workers: int) -> None:
    executor = executor_of(6, workers)

    def compute(shard: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            executor.all_gather_rows([torch.ones(1)], lambda rows: None)
            if shard == 4:
                raise ShardError
            executor.all_gather_rows([torch.ones(1)], lambda rows: None)

    for _ in range(3):
        with pytest.raises(ShardError):
            executor.run(compute)
    gc.collect()  # abandoned shards end when nothing refers to them
    assert not autocast_of_thread()[0]
    assert [enabled for enabled, _ in executor.run(lambda shard: autocast_of_thread())] == [False] * 6


@pytest.fixture
def _many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_many_threads")
def test_workers_compute_with_one_thread_each() -> None:
    assert executor_of(4, 4).run(lambda shard: torch.get_num_threads())[1:] == [1] * 3


def threads_left_by(use: Callable[[ShardExecutor], object]) -> set[threading.Thread]:
    """Return the worker threads that are alive after their executor was deleted."""
    before = set(threading.enumerate())
    executor = executor_of(6, 3)
    use(executor)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del executor
    gc.collect()
    deadline = time.monotonic() + 5
    while (left := started & set(threading.enumerate())) and time.monotonic() < deadline:
        time.sleep(0.002)
    return left


def test_threads_end_with_their_executor() -> None:
    assert threads_left_by(lambda executor: executor.run(failing(executor, -1, 0))) == set()


def test_threads_end_if_a_shard_raised() -> None:
    def fail(executor: ShardExecutor) -> None:
        with pytest.raises(ShardError):
            executor.run(failing(executor, 4, 2))

    assert threads_left_by(fail) == set()


@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (5, 2), (8, 3), (3, 8)])
def test_groups_synchronize_like_their_shards(shards: int, workers: int) -> None:
    gather = Gather()
    executor = executor_of(shards, workers, gather)

    def compute(own: range) -> tuple[range, float]:
        rows = [torch.tensor([float(shard)]) for shard in own]
        return own, executor.all_gather_rows(rows, lambda rows: float(rows.sum()))

    results = executor.run_groups(compute)
    assert [shard for own, _ in results for shard in own] == list(range(shards))
    assert len(results) == min(shards, workers)
    assert executor.largest_group == -(-shards // min(shards, workers))
    assert {total for _, total in results} == {float(sum(range(shards)))}
    assert gather.calls == [[float(shard) for shard in range(shards)]]


def test_alone_only_this_ranks_rows_are_gathered() -> None:
    gather = Gather()
    executor = executor_of(3, 2, gather)
    with executor.alone():
        assert executor.run(lambda shard: executor.all_gather_rows([torch.ones(1)], len)) == [3] * 3
    assert gather.calls == []
    executor.run(lambda shard: executor.all_gather_rows([torch.ones(1)], len))
    assert len(gather.calls) == 1
