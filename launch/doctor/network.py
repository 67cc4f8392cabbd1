"""What nodes find out together: whether they meet, add alike, how fast each pair is, and whose clock is off."""

import os
import random
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from launch.address import way_to

Report = dict[str, Any]
_WARM_UP, _TIMES = 1, 3
_BYTES = 8 * 2**20
_SAMPLED_ABOVE, _SAMPLED_ROUNDS = 32, 8


def measure(address: str, port: int, index: int, count: int, seconds: float) -> Report:
    """Meet at the address, then sum, exchange in pairs and compare clocks with all who came.

    Returns:
        `met`: indices of the nodes that came, empty where this one could not reach the place; and what was measured.
    """
    timeout = timedelta(seconds=seconds)
    try:
        store = TCPStore(address, port, is_master=index == 0, timeout=timeout, wait_for_workers=False)
    except Exception as error:
        return {"met": [], "error": f"{address}:{port} was not reached: {' '.join(str(error).split())[:200]}"}
    met = _who_came(store, index, count, seconds)
    if index not in met or len(met) < 2:
        return {"met": met}
    # Gloo takes the address of the host's name, which many systems map to loopback.
    if interface := way_to(address)[1]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    own_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if own_gpu else torch.device("cpu")
    # A store's keys, not the environment, say who takes part: an absent node must not make the others wait.
    group_store = PrefixStore("group", store)
    dist.init_process_group(
        "nccl" if own_gpu else "gloo", store=group_store, rank=met.index(index), world_size=len(met), timeout=timeout,
        device_id=device if own_gpu else None,
    )  # fmt: skip
    found: Report = {"met": met, "sum_is_right": _sum_is_right(device), "gib_per_second": {}}
    for partner in _partners(met.index(index), len(met)):
        found["gib_per_second"][str(met[partner])] = _exchange(partner, met.index(index), device)
        dist.barrier()
    found["clock_seconds"] = _clock(device)
    dist.barrier()
    return found


def _who_came(store: Store, index: int, count: int, seconds: float) -> list[int]:
    """The nodes that reached the place in time, as the first one counts them."""
    store.set(f"here/{index}", "1")
    if index != 0:
        return [int(one) for one in store.get("met").decode().split(",")]
    deadline, met = time.monotonic() + seconds / 2, [0]
    while len(met) < count and time.monotonic() < deadline:
        met = [one for one in range(count) if one == 0 or store.check([f"here/{one}"])]
        time.sleep(0.05)
    store.set("met", ",".join(map(str, met)))
    return met


def _sum_is_right(device: torch.device) -> bool:
    """All-reduce of values that each rank can foretell, exact in float64."""
    rank, size = dist.get_rank(), dist.get_world_size()
    values = torch.arange(100_000, dtype=torch.float64, device=device)
    given = values * (rank + 1)
    dist.all_reduce(given)
    return bool(torch.equal(given, values * (size * (size + 1) // 2)))


def rounds(size: int) -> list[dict[int, int]]:
    """Every pair once, in rounds of disjoint pairs (the circle method); some of the rounds above 32 nodes."""
    places = list(range(size + size % 2))  # an odd one out rests in each round
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append({a: b for x, y in pairs for a, b in ((x, y), (y, x)) if max(x, y) < size})
        places = [places[0], places[-1], *places[1:-1]]
    if size > _SAMPLED_ABOVE:
        found = random.Random(size).sample(found, _SAMPLED_ROUNDS)
    return found


def _partners(rank: int, size: int) -> list[int]:
    """Of each round; itself where it rests, so that all meet at the same barriers."""
    return [pairs.get(rank, rank) for pairs in rounds(size)]


def _exchange(partner: int, rank: int, device: torch.device) -> float:
    """GiB/s of an all-reduce of two, each sending the other all it has; 0 for none, negative where a byte was wrong."""
    if partner == rank:
        return 0.0
    sent = torch.full((_BYTES // 4,), float(rank + 1), device=device)
    got = torch.empty_like(sent)
    for turn in range(_WARM_UP + _TIMES):
        if turn == _WARM_UP:
            begun = time.perf_counter()
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, got, partner)])
        for work in works:
            work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    speed = _TIMES * _BYTES / 2**30 / seconds
    return speed if bool((got + sent == rank + partner + 2).all()) else -1.0


def _clock(device: torch.device) -> float:
    """Seconds that this clock is ahead of the first node's, as exact as a barrier is short."""
    offsets = []
    for _ in range(5):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=device)
        first = now.clone()
        dist.broadcast(first, src=0)
        offsets.append(float(now - first))
    return min(offsets, key=abs)
