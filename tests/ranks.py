"""Runs a function on several ranks: `run_ranks(fn, world_size, *args)`, each rank a fresh process on this machine."""

import functools
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, ParamSpec, TypeVar

from torch.distributed import TCPStore

P = ParamSpec("P")
R = TypeVar("R")

_LEFT = 42
_GRACE_SECONDS = 0.3  # the reason of a failure may come just behind a peer's complaint of it


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the message is its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60) -> list[Any]:
    """What fn(*args) returns on each rank, in order of rank; None for a rank that called `leave`.

    Args:
        fn: a function at the top level of its module; args and result must be picklable.

    Raises:
        RankFailed: with the traceback of the rank that failed first; all processes have been ended.
    """
    task = pickle.dumps((fn, args))
    context = multiprocessing.get_context("spawn")
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # of this process, as torchrun's agent has it
    ranks: list[tuple[SpawnProcess, Connection]] = []
    try:
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_be_rank, args=(rank, world_size, store.port, task, there), daemon=True)
            process.start()
            there.close()
            ranks.append((process, here))
        return _results(ranks, deadline=time.monotonic() + timeout_seconds, timeout_seconds=timeout_seconds)
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()


def in_group(fn: Callable[P, R]) -> Callable[P, R]:
    """Run the function of a rank inside the project's own process group, on the CPU."""

    @functools.wraps(fn)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch

        from distributed.process_group import process_group
        from distributed.topology import Topology

        with process_group(Topology.from_environment(), torch.device("cpu"), timeout_seconds=30):
            return fn(*args, **kwargs)

    return inside


def once(fn: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` that remembers failures too: ranks that fail are not started again by every test of a fixture."""

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
    """End this rank at once, as a kill would: nothing is closed, nobody is told."""
    os._exit(_LEFT)


def _be_rank(rank: int, world_size: int, port: int, task: bytes, connection: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    try:
        fn, args = pickle.loads(task)  # the function's module comes in here, and torch with it
        import torch

        torch.set_num_threads(1)
        # A plain pickle, not multiprocessing's own: that one leaves tensors in memory which goes away with this process.
        answer = pickle.dumps((True, fn(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(answer)
    connection.close()


def _results(ranks: list[tuple[SpawnProcess, Connection]], *, deadline: float, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[index]
            try:
                good, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                process = ranks[rank][0]
                process.join()
                good, result = process.exitcode == _LEFT, None
                if not good:
                    result = f"it ended with exit code {process.exitcode} and said nothing"
            if good:
                results[rank] = result
                continue
            failures.append(f"rank {rank} of {len(ranks)} failed:\n{result}")
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        raise RankFailed("\n".join(failures[:1] + [f"(then {_last_line(failure)})" for failure in failures[1:]]))
    if waiting:
        late = ", ".join(map(str, sorted(waiting.values())))
        raise RankFailed(f"no word from rank {late} of {len(ranks)} within {timeout_seconds:g} s")
    return [results[rank] for rank in range(len(ranks))]


def _last_line(failure: str) -> str:
    lines = failure.strip().splitlines()
    return f"{lines[0]} {lines[-1]}"
