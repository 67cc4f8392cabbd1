"""Measures, on two ranks of one host, how long an all-reduce over gloo takes. Rank 0 prints microseconds as JSON."""

import json
import time
from statistics import median

import torch
import torch.distributed as dist

from distributed.comm.process_group import process_group
from distributed.topology import Topology

SIZES = {"16 bytes": 4, "64 KiB": 2**14, "1 MiB": 2**18}
"""Sizes of the reduced tensors, as counts of float32 numbers."""


def main() -> None:
    """Print {size: median time in microseconds}."""
    topology = Topology.from_environment()
    torch.set_num_threads(1)
    with process_group(topology, torch.device("cpu"), timeout_seconds=15):
        found = {name: _microseconds(count) for name, count in SIZES.items()}
    if topology.is_main:
        print(json.dumps(found), flush=True)


def _microseconds(count: int, *, repeats: int = 100) -> float:
    times = []
    for _ in range(repeats):
        numbers = torch.ones(count)
        start = time.perf_counter()
        dist.all_reduce(numbers)
        times.append(time.perf_counter() - start)
        if numbers[0] != dist.get_world_size():
            raise RuntimeError(f"all-reduce of ones gave {numbers[0]}")
    return median(times[repeats // 10 :]) * 1e6


if __name__ == "__main__":
    main()
