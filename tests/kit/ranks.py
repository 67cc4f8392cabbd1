"""Runs a function on several ranks: `run_ranks(fn, world_size, *args)`, each rank a fresh process on this machine.

Ranks are forked from processes that have imported torch. Four of those: ranks 0 to 3 differ in the hashes of strings, and with
them in the order of sets, as processes that were started one by one do.
"""

import functools
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any, ParamSpec, TypeVar

import torch
from torch.distributed import TCPStore

from kit.nursery import Nursery

P = ParamSpec("P")
R = TypeVar("R")

_LEFT = 42
_NURSERIES = 4
_PRELOAD = ("pytest", "distributed.recipe", "torch._dynamo")
_DEEPSPEED = "deepspeed.runtime.zero.muon.original_muon"  # it brings the rest; left to the ranks, it takes them seconds
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
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # of this process, as torchrun's agent has it
    ranks: list[_Rank] = []
    nurseries = [_nursery(rank % _NURSERIES) for rank in range(world_size)]
    for nursery in nurseries:  # on a busy machine the first rank would wait for the last one's in vain
        nursery.get_ready()
    try:
        for rank, nursery in enumerate(nurseries):
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
            ranks.append(_Rank(nursery, *nursery.bear((environment, task))))
        return _results(ranks, deadline=time.monotonic() + timeout_seconds, timeout_seconds=timeout_seconds)
    finally:
        for each in ranks:
            each.nursery.kill(each.number)
            each.connection.close()


def in_group(fn: Callable[P, R]) -> Callable[P, R]:
    """Run the function of a rank inside the project's own process group, on the CPU."""
    return _in_group_on("cpu", fn, timeout_seconds=30)


def in_group_on_gpus(fn: Callable[P, R]) -> Callable[P, R]:
    """As `in_group`, on a GPU for each rank, over NCCL."""
    return _in_group_on("cuda", fn, timeout_seconds=60)


def _in_group_on(device: str, fn: Callable[P, R], *, timeout_seconds: float) -> Callable[P, R]:
    @functools.wraps(fn)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        from distributed import attempt
        from distributed.comm.process_group import choose_device, process_group
        from distributed.topology import Topology
        from distributed.training.determinism import make_deterministic

        vars(attempt)["draw_curves"] = lambda *_, **__: None  # which takes longer than a small run
        topology = Topology.from_environment()
        own = choose_device(device, topology)
        make_deterministic(own, precision="float32")
        with process_group(topology, own, timeout_seconds=timeout_seconds):
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


@dataclass(frozen=True)
class _Rank:
    nursery: Nursery
    number: int
    connection: Connection


_nurseries: dict[int, Nursery] = {}


def _nursery(index: int) -> Nursery:
    if index not in _nurseries or not _nurseries[index].is_alive:
        # DeepSpeed looks for a GPU when it is imported, after which there is no forking.
        without = torch.cuda.is_available() or find_spec("deepspeed") is None
        _nurseries[index] = Nursery(_be_rank, _PRELOAD if without else (*_PRELOAD, _DEEPSPEED))
    return _nurseries[index]


def _be_rank(environment_and_task: tuple[dict[str, str], bytes], connection: Connection) -> None:
    environment, task = environment_and_task
    os.environ.clear()
    os.environ.update(environment)
    try:
        fn, args = pickle.loads(task)  # the function's module comes in here
        torch.set_num_threads(1)
        # A plain pickle, not multiprocessing's own: that one leaves tensors in memory which goes away with this process.
        answer = pickle.dumps((True, fn(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(answer)
    connection.close()


def _results(ranks: list[_Rank], *, deadline: float, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {each.connection: rank for rank, each in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[index]
            try:
                good, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                exit_code = ranks[rank].nursery.exit_code(ranks[rank].number)
                good, result = exit_code == _LEFT, None
                if not good:
                    result = f"it ended with exit code {exit_code} and said nothing"
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
