"""The ranks of an attempt agree on a token, whatever dead ranks left in the store. Threads stand for processes."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store, TCPStore

from distributed.comm.process_group import have_own_gpu
from distributed.comm.rendezvous import agree_on_token
from distributed.errors import InputError, PeerError

pytestmark = pytest.mark.timeout(60)
PATIENCE = timedelta(seconds=10)


def attend(pool: ThreadPoolExecutor, store: Store, rank: int, world_size: int, delay: float = 0.0) -> Future[str]:
    """A rank that comes after a while."""

    def come() -> str:
        time.sleep(delay)
        return agree_on_token(store, rank=rank, world_size=world_size, timeout=PATIENCE)

    return pool.submit(come)


def meet(stores: list[Store], *, delays: list[float] | None = None) -> str:
    """The one token that all ranks of an attempt come back with, each over its own store."""
    count = len(stores)
    with ThreadPoolExecutor(count) as pool:
        waits = delays or [0.0] * count
        ranks = [attend(pool, store, rank, count, waits[rank]) for rank, store in enumerate(stores)]
        (token,) = {rank.result() for rank in ranks}
    return token


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def proposal(store: Store) -> dict[str, dict[str, str] | str]:
    return json.loads(store.get("proposal")) if store.check(["proposal"]) else {}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_get_the_same_token(world_size: int) -> None:
    assert meet([HashStore()] * world_size)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_rank_may_come_late(late: int) -> None:
    assert meet([HashStore()] * 3, delays=[0.3 * (rank == late) for rank in range(3)])


def test_attempts_after_one_another_over_one_store_have_tokens_of_their_own() -> None:
    store, dice = HashStore(), random.Random(0)
    sizes = [dice.randrange(1, 5) for _ in range(25)]
    tokens = [meet([store] * size, delays=[dice.uniform(0, 0.03) for _ in range(size)]) for size in sizes]
    assert len(set(tokens)) == 25


def test_attempts_after_one_another_over_one_tcp_store_have_tokens_of_their_own() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tokens = set()
    for size in (3, 3, 2, 4, 3):
        clients = [TCPStore("127.0.0.1", server.port, is_master=False, timeout=PATIENCE) for _ in range(size)]
        tokens.add(meet(clients))
    assert len(tokens) == 5


@pytest.mark.parametrize("first", [0, 1, 2])
def test_what_an_attempt_that_died_after_its_go_left_behind_is_passed_over(first: int) -> None:
    """Everything of it fits together: hellos, a proposal that names them, acknowledgements and the go."""
    store = HashStore()
    leave_an_attempt(store, token="dead", world_size=3, acknowledged=[1, 2], go=True)
    delays = [0.0 if rank == first else 0.15 for rank in range(3)]
    assert meet([store] * 3, delays=delays) != "dead"


@pytest.mark.parametrize("acknowledged", [[], [1], [1, 2]])
def test_what_an_attempt_that_died_before_its_go_left_behind_is_passed_over(acknowledged: list[int]) -> None:
    store = HashStore()
    leave_an_attempt(store, token="dead", world_size=3, acknowledged=acknowledged, go=False)
    assert meet([store] * 3, delays=[0.0, 0.1, 0.2]) != "dead"


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (3, 1)])
def test_an_attempt_of_another_size_is_passed_over(before: int, now: int) -> None:
    store = HashStore()
    leave_an_attempt(store, token="dead", world_size=before, acknowledged=list(range(1, before)), go=True)
    assert meet([store] * now, delays=[0.05 * rank for rank in range(now)]) != "dead"


def leave_an_attempt(store: Store, *, token: str, world_size: int, acknowledged: list[int], go: bool) -> None:
    nonces = {str(rank): f"{token}-{rank}" for rank in range(world_size)}
    for rank, nonce in nonces.items():
        store.set(f"hello/{rank}", nonce)
    store.set("proposal", json.dumps({"token": token, "nonces": nonces}))
    for rank in acknowledged:
        store.set(f"acknowledged/{rank}", token)
    if go:
        store.set("go", token)


def test_a_rank_that_dies_after_its_hello_is_replaced() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        store.set("hello/1", "ghost")
        ranks = [attend(pool, store, rank, 3) for rank in (0, 2)]
        wait_for(lambda: "ghost" in proposal(store).get("nonces", {}).values())
        assert not any(rank.done() for rank in ranks), "they went without rank 1"
        ranks.append(attend(pool, store, 1, 3))
        assert len({rank.result() for rank in ranks}) == 1


def test_a_rank_that_dies_after_its_acknowledgement_is_replaced() -> None:
    """Its acknowledgement was for a proposal that named it; a new one is made for its successor."""
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        for rank in (1, 2):
            store.set(f"hello/{rank}", f"ghost {rank}")
        main = attend(pool, store, 0, 3)
        wait_for(lambda: bool(proposal(store)))
        of_ghosts = str(proposal(store)["token"])
        store.set("acknowledged/1", of_ghosts)
        successor = attend(pool, store, 1, 3)
        wait_for(lambda: proposal(store)["token"] != of_ghosts)
        wait_for(lambda: store.get("acknowledged/1").decode() != of_ghosts)
        assert not main.done(), "rank 0 went without rank 2"
        other = attend(pool, store, 2, 3)
        (token,) = {main.result(), successor.result(), other.result()}
    assert token != of_ghosts


def test_rank_0_is_replaced_while_the_others_wait() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        others = [attend(pool, store, rank, 3) for rank in (1, 2)]
        wait_for(lambda: store.check(["hello/1", "hello/2"]))
        # What a rank 0 wrote that read both hellos, and died before it could say go.
        nonces = {"0": "ghost", **{str(rank): store.get(f"hello/{rank}").decode() for rank in (1, 2)}}
        store.set("proposal", json.dumps({"token": "ghost's", "nonces": nonces}))
        wait_for(lambda: store.check(["acknowledged/1", "acknowledged/2"]))
        assert not any(rank.done() for rank in others)
        main = attend(pool, store, 0, 3)
        (token,) = {main.result(), *(rank.result() for rank in others)}
    assert token != "ghost's"


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "^rank 1, 2 of 3 did not arrive"), (2, "^rank 0, 1 of 3 did not arrive")]
)
def test_a_rank_that_waits_in_vain_says_for_whom(rank: int, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(PeerError, match=said):
        agree_on_token(HashStore(), rank=rank, world_size=3, timeout=timedelta(seconds=0.3))
    assert 0.3 <= time.monotonic() - start < 3


def test_rank_0_names_only_those_that_are_missing() -> None:
    store = HashStore()
    leave_an_attempt(store, token="dead", world_size=3, acknowledged=[1, 2], go=True)
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(agree_on_token, store, rank=r, world_size=3, timeout=timedelta(seconds=0.5)) for r in (0, 1)
        ]
        with pytest.raises(PeerError, match=r"^rank 2 of 3 did not arrive"):
            ranks[0].result()
        with pytest.raises(PeerError):
            ranks[1].result()


def met(sizes: list[int], ranks: list[int]) -> list[str]:
    """What processes of these ranks, each with its number of ranks, find at one store, started one after another."""
    store = HashStore()

    def come(place: tuple[int, int]) -> str:
        size, rank = place
        try:
            return agree_on_token(store, rank=rank, world_size=size, timeout=timedelta(seconds=2), where="here:1")
        except (InputError, PeerError) as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        coming = []
        for place in zip(sizes, ranks, strict=True):
            coming.append(pool.submit(come, place))
            time.sleep(0.1)
        return [each.result() for each in coming]


@pytest.mark.parametrize("sizes", [[2, 3], [2, 1000]])
def test_ranks_of_unlike_worlds_both_say_so(sizes: list[int]) -> None:
    first, second = met(sizes, [0, 1])
    assert first == second
    assert f"WORLD_SIZE = {sizes[1]} on rank 1, but 2 on rank 0" in first


def test_a_rank_given_twice_is_refused_and_the_later_one_goes_on() -> None:
    one, two, main = met([2, 2, 2], [1, 1, 0])
    assert one.startswith("environment: RANK = 1 was given to two processes that meet at here:1")
    assert two == main


def own_gpus(*gpus: str) -> list[bool | str]:
    """What each rank finds when these are their GPUs; in words if it is an error."""
    store = HashStore()

    def ask(rank: int) -> bool | str:
        try:
            return have_own_gpu(store, gpus[rank], rank=rank, world_size=len(gpus))
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(ask, range(len(gpus))))


def test_ranks_that_each_see_one_gpu_of_their_own_have_it_to_themselves() -> None:
    assert own_gpus("node-a GPU-1", "node-a GPU-2", "node-b GPU-3") == [True] * 3


def test_ranks_that_share_a_gpu_all_find_so() -> None:
    assert own_gpus("node-a GPU-1", "node-b GPU-2", "node-b GPU-2") == [False] * 3


def test_ranks_on_cpus_have_no_gpu() -> None:
    assert own_gpus("", "") == [False] * 2


def test_a_rank_without_a_gpu_beside_others_is_named_on_all_ranks() -> None:
    found = own_gpus("node-a GPU-1", "", "node-a GPU-2")
    assert len(set(found)) == 1
    assert "rank 1 has no CUDA device" in found[0]
