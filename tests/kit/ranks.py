"""Runs a function on several ranks: `run_ranks(fn, world_size, *args)`, each rank a new process on this machine.

Ranks are forked from multiprocessing's fork server, which has imported torch: importing it takes longer than most tests.
"""

import faulthandler
import functools
import multiprocessing
import os
import pickle
import random
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import pytest
import torch
from torch.distributed import TCPStore

from kit.speed import slowness

P = ParamSpec("P")
R = TypeVar("R")

MAX_RANKS: int | None = None
"""Tests that start more ranks are skipped; set by pytest's option --max-ranks."""

_LEFT = 42
_GRACE_SECONDS = 0.3  # a rank's own failure may arrive just after a peer's complaint about it
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["kit.preload"])
_READ_AT_START = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    # Do not return memory to the system after each step; requesting it again takes time.
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}",  # Python 3.11 preloads without the parent's path
}


class RankFailed(AssertionError):
    """A rank raised, died or timed out; the message is its traceback."""


class _Rank(NamedTuple):
    process: BaseProcess
    answer: Connection


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60) -> list[Any]:
    """Return fn(*args) of each rank, in order of rank; None for a rank that called `leave`.

    Args:
        fn: a function at the top level of its module; args and result must be picklable.

    Raises:
        RankFailed: with the traceback of the rank that failed first; all processes have ended.
    """
    if MAX_RANKS and world_size > MAX_RANKS:
        pytest.skip(f"starts more than {MAX_RANKS} ranks")
    task = pickle.dumps((fn, args))
    # In this process, like torchrun's agent, which has it in its own.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    try:
        for rank in range(world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
            }
            ranks.append(_started(environment, task))
        return _results(ranks, timeout_seconds=timeout_seconds * slowness())
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.answer.close()
        for rank in ranks:
            rank.process.join()


def in_group(fn: Callable[P, R]) -> Callable[P, R]:
    """Run the function of a rank inside the project's own process group, on the CPU."""
    return _in_group_on("cpu", fn, timeout_seconds=30)


def in_group_on_gpus(fn: Callable[P, R]) -> Callable[P, R]:
    """Like `in_group`, but with one GPU per rank, over NCCL."""
    return _in_group_on("cuda", fn, timeout_seconds=60)


def _in_group_on(device: str, fn: Callable[P, R], *, timeout_seconds: float) -> Callable[P, R]:
    @functools.wraps(fn)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        from distributed.comm.process_group import choose_device, process_group
        from distributed.topology import Topology
        from distributed.training.determinism import make_deterministic

        topology = Topology.from_environment()
        own = choose_device(device, topology)
        make_deterministic(own, precision="float32")
        with process_group(topology, own, timeout_seconds=timeout_seconds):
            return fn(*args, **kwargs)

    return inside


def once(fn: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` that also remembers failures: failing ranks are not started again by every test of a fixture."""

    @functools.cache
    def outcome(*args: P.args, **kwargs: P.kwargs) -> tuple[R | None, RankFailed | None]:
        try:
            return fn(*args, **kwargs), None
        except RankFailed as failure:
            return None, failure

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result, failure = outcome(*args, **kwargs)
        if failure:
            raise failure
        return result  # type: ignore[return-value]

    return call


def leave() -> None:
    """End this rank at once, as a kill would: nothing is closed, no peer is notified."""
    os._exit(_LEFT)


def _started(environment: dict[str, str], task: bytes) -> _Rank:
    answer, there = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_be_rank, args=(environment, task, there), daemon=True)
    before = dict(os.environ)
    os.environ.update(_READ_AT_START)  # for the server, which the first process starts
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
        there.close()
    return _Rank(process, answer)


def _be_rank(environment: dict[str, str], task: bytes, connection: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    assert "kit.preload" in sys.modules, "the fork server could not import kit.preload, and says nothing"
    faulthandler.enable()
    random.seed()  # otherwise every rank continues the server's sequence
    try:
        fn, args = pickle.loads(task)  # imports the function's module
        torch.set_num_threads(1)
        # A plain pickle: multiprocessing's own shares tensors in memory that disappears with this process.
        answer = pickle.dumps((True, fn(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(answer)
    connection.close()
    os._exit(0)  # no finalizers: some of them wait for threads of a process group that is still open


def _results(ranks: list[_Rank], *, timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {each.answer: rank for rank, each in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[index]
            good, result = _answer_of(ranks[rank])
            if good:
                results[rank] = result
                continue
            failures.append(f"rank {rank} of {len(ranks)} failed:\n{result}")
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        raise RankFailed("\n".join(failures[:1] + [f"(then {_last_line(failure)})" for failure in failures[1:]]))
    if waiting:
        late = ", ".join(map(str, sorted(waiting.values())))
        raise RankFailed(f"no answer from rank {late} of {len(ranks)} within {timeout_seconds:.0f} s")
    return [results[rank] for rank in range(len(ranks))]


def _answer_of(rank: _Rank) -> tuple[bool, Any]:
    """Return whether the rank succeeded, and its result or traceback."""
    try:
        return pickle.loads(rank.answer.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        rank.process.join()
        if rank.process.exitcode == _LEFT:
            return True, None
        return False, f"it ended with exit code {rank.process.exitcode} and no answer"


def _last_line(failure: str) -> str:
    lines = failure.strip().splitlines()
    return f"{lines[0]} {lines[-1]}"
