"""Measures the network between nodes: rendezvous, all-reduce, speed of each pair, clock differences."""

import os
import random
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from distributed.comm.torch_compat import PrefixStore, Store, TCPStore
from distributed.errors import InputError
from launch.address import local_route
from launch.doctor.reports import Network

_WARM_UP, _REPEATS = 1, 3
_BYTES = 8 * 2**20
_SAMPLED_ABOVE, _SAMPLED_ROUNDS = 32, 8


def measure(address: str, port: int, index: int, count: int, seconds: float, *, uses_gpus: bool = True) -> Network:
    """Join the other nodes at an address; then sum, exchange data in pairs and compare clocks with those present.

    Args:
        index: this node's index among `count` nodes; node 0 hosts the rendezvous.
        uses_gpus: measure between GPUs if all nodes have some.

    Raises:
        InputError: the address was not reached in time.
    """
    timeout = timedelta(seconds=seconds)
    try:
        store = TCPStore(address, port, is_master=index == 0, timeout=timeout, wait_for_workers=False)
    except Exception as error:
        raise InputError(f"{address}:{port} was not reached: {' '.join(str(error).split())[:200]}") from None
    present = _present_nodes(store, index, count, seconds)
    if index not in present or len(present) < 2:
        return Network(present=present)
    # By default Gloo uses the address of the host's name, which many systems map to loopback.
    if interface := local_route(address).interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    has_gpu = uses_gpus and _all_have_gpus(store, present)
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    rank = present.index(index)
    # The group consists of the nodes that are present; with the environment's ranks, it would wait for absent ones.
    dist.init_process_group(
        "nccl" if has_gpu else "gloo", store=PrefixStore("group", store), rank=rank, world_size=len(present),
        timeout=timeout, device_id=device if has_gpu else None,
    )  # fmt: skip
    sum_is_right = _sum_is_right(device)
    speeds = {}
    for pairs in rounds(len(present)):
        partner = pairs.get(rank, rank)  # without a partner, it still takes part in the barrier
        speeds[present[partner]] = _exchange(partner, rank, device)
        dist.barrier()
    clock = _clock_offset(device)
    dist.barrier()
    return Network(present=present, sum_is_right=sum_is_right, gib_per_second=speeds, clock_seconds=clock)


def _present_nodes(store: Store, index: int, count: int, seconds: float) -> list[int]:
    """Return the indices of the nodes that reached the rendezvous in time, as node 0 counts them."""
    store.set(f"here/{index}", "gpu" if torch.cuda.is_available() else "cpu")
    if index != 0:
        return [int(node) for node in store.get("present").decode().split(",")]
    deadline, present = time.monotonic() + seconds / 2, [0]
    while len(present) < count and time.monotonic() < deadline:
        present = [node for node in range(count) if node == 0 or store.check([f"here/{node}"])]
        time.sleep(0.05)
    store.set("present", ",".join(map(str, present)))
    return present


def _all_have_gpus(store: Store, present: list[int]) -> bool:
    """Whether these nodes can form an NCCL group. One without a GPU is reported elsewhere; here all use gloo then."""
    return all(store.get(f"here/{node}") == b"gpu" for node in present)


def _sum_is_right(device: torch.device) -> bool:
    """Whether an all-reduce of known values, exact in float64, gives their sum."""
    rank, size = dist.get_rank(), dist.get_world_size()
    values = torch.arange(100_000, dtype=torch.float64, device=device)
    total = values * (rank + 1)
    dist.all_reduce(total)
    return bool(torch.equal(total, values * (size * (size + 1) // 2)))


def rounds(size: int) -> list[dict[int, int]]:
    """Return rounds of disjoint pairs that cover every pair once (the circle method); above 32 nodes, some of the rounds.

    Each round maps a rank to its partner. With an odd number of ranks, one sits out each round.
    """
    circle = list(range(size + size % 2))
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append({a: b for x, y in pairs for a, b in ((x, y), (y, x)) if max(x, y) < size})
        circle = [circle[0], circle[-1], *circle[1:-1]]
    if size > _SAMPLED_ABOVE:
        found = random.Random(size).sample(found, _SAMPLED_ROUNDS)
    return found


def _exchange(partner: int, rank: int, device: torch.device) -> float:
    """Return the GiB/s of two ranks that send each other 8 MiB; 0 without a partner, -1 if a byte was wrong."""
    if partner == rank:
        return 0.0
    sent = torch.full((_BYTES // 4,), float(rank + 1), device=device)
    received = torch.empty_like(sent)
    for turn in range(_WARM_UP + _REPEATS):
        if turn == _WARM_UP:
            _synchronize(device)
            start = time.perf_counter()
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    _synchronize(device)
    seconds = time.perf_counter() - start
    speed = _REPEATS * _BYTES / 2**30 / seconds
    return speed if bool((received + sent == rank + partner + 2).all()) else -1.0


def _synchronize(device: torch.device) -> None:
    """Wait for transfers that NCCL has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock_offset(device: torch.device) -> float:
    """Return the seconds by which this clock is ahead of the first node's, to within the duration of a barrier."""
    offsets = []
    for _ in range(5):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=device)
        first = now.clone()
        dist.broadcast(first, src=0)
        offsets.append(float(now - first))
    return min(offsets, key=abs)
