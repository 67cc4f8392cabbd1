"""The ranks of an attempt agree on a token despite keys of dead ranks. Threads stand in for processes."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from kit.speed import slowness
from torch.distributed import HashStore, Store, TCPStore

from distributed.comm.process_group import each_rank_has_a_gpu
from distributed.comm.rendezvous import agree_on_token
from distributed.errors import InputError, PeerError

pytestmark = pytest.mark.timeout(60)
TIMEOUT = timedelta(seconds=10)


def start_rank(pool: ThreadPoolExecutor, store: Store, rank: int, world_size: int, delay: float = 0.0) -> Future[str]:
    """Start a rank after a delay."""

    def run() -> str:
        time.sleep(delay)
        return agree_on_token(store, rank=rank, world_size=world_size, timeout=TIMEOUT)

    return pool.submit(run)


def rendezvous(stores: list[Store], *, delays: list[float] | None = None) -> str:
    """Run all ranks of an attempt, each with its own store object. Return their common token."""
    count = len(stores)
    with ThreadPoolExecutor(count) as pool:
        waits = delays or [0.0] * count
        ranks = [start_rank(pool, store, rank, count, waits[rank]) for rank, store in enumerate(stores)]
        (token,) = {rank.result() for rank in ranks}
    return token


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5 * slowness()
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


def proposal(store: Store) -> dict[str, dict[str, str] | str]:
    return json.loads(store.get("proposal")) if store.check(["proposal"]) else {}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_get_the_same_token(world_size: int) -> None:
    assert rendezvous([HashStore()] * world_size)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_rank_may_arrive_late(late: int) -> None:
    assert rendezvous([HashStore()] * 3, delays=[0.3 * (rank == late) for rank in range(3)])


def test_consecutive_attempts_get_different_tokens() -> None:
    store, dice = HashStore(), random.Random(0)
    sizes = [dice.randrange(1, 5) for _ in range(25)]
    tokens = [rendezvous([store] * size, delays=[dice.uniform(0, 0.03) for _ in range(size)]) for size in sizes]
    assert len(set(tokens)) == 25


def test_attempts_on_a_tcp_store_get_different_tokens() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tokens = set()
    for size in (3, 3, 2, 4, 3):
        clients = [TCPStore("127.0.0.1", server.port, is_master=False, timeout=TIMEOUT) for _ in range(size)]
        tokens.add(rendezvous(clients))
    assert len(tokens) == 5


@pytest.mark.parametrize("first", [0, 1, 2])
def test_leftovers_of_an_attempt_after_go_are_ignored(first: int) -> None:
    """The leftovers are consistent: hellos, a proposal that names them, acknowledgements and go."""
    store = HashStore()
    leave_keys(store, token="dead", world_size=3, acknowledged=[1, 2], go=True)
    delays = [0.0 if rank == first else 0.15 for rank in range(3)]
    assert rendezvous([store] * 3, delays=delays) != "dead"


@pytest.mark.parametrize("acknowledged", [[], [1], [1, 2]])
def test_leftovers_of_an_attempt_before_go_are_ignored(acknowledged: list[int]) -> None:
    store = HashStore()
    leave_keys(store, token="dead", world_size=3, acknowledged=acknowledged, go=False)
    assert rendezvous([store] * 3, delays=[0.0, 0.1, 0.2]) != "dead"


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (3, 1)])
def test_leftovers_of_another_world_size_are_ignored(before: int, now: int) -> None:
    store = HashStore()
    leave_keys(store, token="dead", world_size=before, acknowledged=list(range(1, before)), go=True)
    assert rendezvous([store] * now, delays=[0.05 * rank for rank in range(now)]) != "dead"


def leave_keys(store: Store, *, token: str, world_size: int, acknowledged: list[int], go: bool) -> None:
    nonces = {str(rank): f"{token}-{rank}" for rank in range(world_size)}
    for rank, nonce in nonces.items():
        store.set(f"hello/{rank}", nonce)
    store.set("proposal", json.dumps({"token": token, "nonces": nonces}))
    for rank in acknowledged:
        store.set(f"acknowledged/{rank}", token)
    if go:
        store.set("go", token)


def test_rank_that_dies_after_hello_is_replaced() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        store.set("hello/1", "ghost")
        ranks = [start_rank(pool, store, rank, 3) for rank in (0, 2)]
        wait_for(lambda: "ghost" in proposal(store).get("nonces", {}).values())
        assert not any(rank.done() for rank in ranks), "proceeded without rank 1"
        ranks.append(start_rank(pool, store, 1, 3))
        assert len({rank.result() for rank in ranks}) == 1


def test_rank_that_dies_after_acknowledging_is_replaced() -> None:
    """It acknowledged a proposal with its own nonce; rank 0 makes a new one for its successor."""
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        for rank in (1, 2):
            store.set(f"hello/{rank}", f"ghost {rank}")
        main = start_rank(pool, store, 0, 3)
        wait_for(lambda: bool(proposal(store)))
        ghosts_token = str(proposal(store)["token"])
        store.set("acknowledged/1", ghosts_token)
        successor = start_rank(pool, store, 1, 3)
        wait_for(lambda: proposal(store)["token"] != ghosts_token)
        wait_for(lambda: store.get("acknowledged/1").decode() != ghosts_token)
        assert not main.done(), "rank 0 proceeded without rank 2"
        other = start_rank(pool, store, 2, 3)
        (token,) = {main.result(), successor.result(), other.result()}
    assert token != ghosts_token


def test_rank_0_is_replaced_while_the_others_wait() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        others = [start_rank(pool, store, rank, 3) for rank in (1, 2)]
        wait_for(lambda: store.check(["hello/1", "hello/2"]))
        # Written by a rank 0 that read both hellos and died before setting go.
        nonces = {"0": "ghost", **{str(rank): store.get(f"hello/{rank}").decode() for rank in (1, 2)}}
        store.set("proposal", json.dumps({"token": "ghost's", "nonces": nonces}))
        wait_for(lambda: store.check(["acknowledged/1", "acknowledged/2"]))
        assert not any(rank.done() for rank in others)
        main = start_rank(pool, store, 0, 3)
        (token,) = {main.result(), *(rank.result() for rank in others)}
    assert token != "ghost's"


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "^rank 1, 2 of 3 did not arrive"), (2, "^rank 0, 1 of 3 did not arrive")]
)
def test_waiting_rank_names_the_missing_ranks(rank: int, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(PeerError, match=message):
        agree_on_token(HashStore(), rank=rank, world_size=3, timeout=timedelta(seconds=0.3))
    assert 0.3 <= time.monotonic() - start < 3 * slowness()


def test_rank_0_names_only_the_missing_ranks() -> None:
    store = HashStore()
    leave_keys(store, token="dead", world_size=3, acknowledged=[1, 2], go=True)
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(agree_on_token, store, rank=r, world_size=3, timeout=timedelta(seconds=0.5)) for r in (0, 1)
        ]
        with pytest.raises(PeerError, match=r"^rank 2 of 3 did not arrive"):
            ranks[0].result()
        with pytest.raises(PeerError):
            ranks[1].result()


def outcomes(sizes: list[int], ranks: list[int]) -> list[str]:
    """Tokens or error messages of processes with these world sizes and ranks, started one after another."""
    store = HashStore()

    def run(size: int, rank: int) -> str:
        try:
            return agree_on_token(store, rank=rank, world_size=size, timeout=timedelta(seconds=2), endpoint="here:1")
        except (InputError, PeerError) as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        running = []
        for size, rank in zip(sizes, ranks, strict=True):
            running.append(pool.submit(run, size, rank))
            time.sleep(0.1)
        return [each.result() for each in running]


@pytest.mark.parametrize("sizes", [[2, 3], [2, 1000]])
def test_unequal_world_sizes_are_reported_by_both_ranks(sizes: list[int]) -> None:
    first, second = outcomes(sizes, [0, 1])
    assert first == second
    assert f"WORLD_SIZE = {sizes[1]} on rank 1, but 2 on rank 0" in first


def test_duplicate_rank_is_refused_and_the_later_one_runs() -> None:
    one, two, main = outcomes([2, 2, 2], [1, 1, 0])
    assert one.startswith("environment: RANK = 1 was given to two processes at here:1")
    assert two == main


def own_gpus(*gpus: str) -> list[bool | str]:
    """Each rank's result for these GPUs, or its error message."""
    store = HashStore()

    def run(rank: int) -> bool | str:
        try:
            return each_rank_has_a_gpu(store, gpus[rank], rank=rank, world_size=len(gpus))
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(run, range(len(gpus))))


def test_one_gpu_per_rank_is_detected() -> None:
    assert own_gpus("node-a GPU-1", "node-a GPU-2", "node-b GPU-3") == [True] * 3


def test_shared_gpu_is_detected_by_all_ranks() -> None:
    assert own_gpus("node-a GPU-1", "node-b GPU-2", "node-b GPU-2") == [False] * 3


def test_cpu_ranks_have_no_gpu() -> None:
    assert own_gpus("", "") == [False] * 2


def test_rank_without_a_gpu_is_named_on_all_ranks() -> None:
    found = own_gpus("node-a GPU-1", "", "node-a GPU-2")
    assert len(set(found)) == 1
    assert "rank 1 has no CUDA device" in found[0]
