import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from distributed.comm.rendezvous import agree_on_token
from distributed.errors import PeerError


def tokens(store: HashStore, world_size: int) -> list[str]:
    with ThreadPoolExecutor(world_size) as pool:
        works = [
            pool.submit(agree_on_token, store, rank=rank, world_size=world_size, timeout=timedelta(seconds=10))
            for rank in reversed(range(world_size))
        ]
        return [work.result() for work in works]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_agree_on_one_token(world_size):
    assert len(set(tokens(HashStore(), world_size))) == 1


def test_each_attempt_on_a_store_gets_a_new_token():
    store = HashStore()
    attempts = [tokens(store, 3) for _ in range(4)]
    assert [len(set(attempt)) for attempt in attempts] == [1] * 4
    assert len({attempt[0] for attempt in attempts}) == 4


def test_leftovers_of_a_dead_attempt_are_ignored():
    store = HashStore()
    store.set("proposal", json.dumps({"token": "old", "nonces": {"0": "a", "1": "b"}}))
    for key, value in {"hello/0": "a", "hello/1": "b", "acknowledged/1": "old", "go": "old"}.items():
        store.set(key, value)
    first, second = tokens(store, 2)
    assert first == second != "old"


def test_missing_ranks_are_named():
    short = timedelta(seconds=0.05)
    with pytest.raises(PeerError, match=r"^rank 1 of 2 did not arrive at here:1 within 0.05 s; "):
        agree_on_token(HashStore(), rank=0, world_size=2, timeout=short, endpoint="here:1")
    with pytest.raises(PeerError, match=r"^rank 0, 2 of 3 did not arrive at here:1 within 0.05 s; "):
        agree_on_token(HashStore(), rank=1, world_size=3, timeout=short, endpoint="here:1")
