"""The shards of a rank, carried by a few threads, that meet where the whole batch is summed over.

A shard goes through the model by itself, in kernels of one thread, so it computes the same whatever the number of
processes and cores. A lane is one thread that carries several shards, each as a greenlet: where a shard meets the others
it steps aside and the lane takes up the next, for a microsecond, where handing on to another thread takes a hundred.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import greenlet
import torch
from torch import Tensor

from distributed.comm.reduction_tree import shard_range
from distributed.exact.streams import ShardStreams

T = TypeVar("T")
Gather = Callable[[list[Tensor]], Tensor]
"""Takes a row of each shard of this rank, returns those of all shards of all ranks: [shards, len(row)]."""


class ShardExecutor:
    """Runs the shards of this rank; the calling thread is one of the lanes.

    Args:
        lanes: how many shards compute at the same time, at the most.
        gather: the exchange with the other ranks; called once a meeting, in any of the lanes' threads.
        side_by_side: on CUDA, run each shard on its own stream; needs a single lane.
    """

    def __init__(
        self, shards: int, *, lanes: int, gather: Gather, device: torch.device, side_by_side: bool = False
    ) -> None:
        lanes = min(lanes, shards)
        self._streams = ShardStreams(shards if side_by_side and lanes == 1 else 0, device)
        self._gather, self._device = gather, device
        self._carried = [shard_range(lane, lanes, shards) for lane in range(lanes)]
        self._helpers = ThreadPoolExecutor(max(1, lanes - 1), "lane", prepare_thread, (device,))
        self._rows: list[Tensor] = [torch.empty(0)] * shards
        self._combine: Callable[[Tensor], Any] | None = None
        self._outcome: Any = None
        self._together = threading.Barrier(lanes, self._exchange)

    def run(self, compute: Callable[[int], T]) -> list[T]:
        """`compute(shard)` of every shard; all of them meet equally often.

        Raises:
            Exception: what a shard raised; the others are given up.
        """
        results: dict[int, T] = {}
        others = [self._helpers.submit(self._carry, own, compute, results) for own in self._carried[1:]]
        failures: list[BaseException] = []
        try:
            self._carry(self._carried[0], compute, results)
        except BaseException as error:
            failures.append(error)
        failures += [failed for other in others if (failed := other.exception()) is not None]
        if failures:
            self._together.reset()
            raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
        return [results[shard] for shard in sorted(results)]

    def meet(self, shard: int, row: Tensor, combine: Callable[[Tensor], T]) -> T:
        """Called by each shard with its row: `combine` of all shards' rows, computed once and given to everybody."""
        self._rows[shard], self._combine = row, combine
        # Autocast belongs to the thread; the shard that comes next has its own.
        kind = self._device.type
        autocast = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, False)
        lane = greenlet.getcurrent().parent
        assert lane is not None
        lane.switch()
        torch.set_autocast_enabled(kind, autocast)
        outcome: T = self._outcome
        return outcome

    def _carry(self, shards: range, compute: Callable[[int], T], results: dict[int, T]) -> None:
        waiting = [(shard, greenlet.greenlet(compute)) for shard in shards]
        try:
            arguments: dict[int, tuple[int, ...]] = {shard: (shard,) for shard in shards}
            while waiting:
                met = []
                self._streams.fork()
                for shard, carried in waiting:
                    with self._streams.of(shard):
                        result = carried.switch(*arguments.pop(shard, ()))
                    if carried.dead:
                        results[shard] = result
                    else:
                        met.append((shard, carried))
                self._streams.join()
                if met:
                    self._together.wait()
                waiting = met[::-1]  # what was in the cache last comes first
        except BaseException:
            self._together.abort()
            for _, carried in waiting:
                with suppress(BaseException):
                    carried.throw()  # here, in its own thread: it leaves the contexts that it is in
            raise

    def _exchange(self) -> None:
        assert self._combine is not None
        self._outcome, self._combine = self._combine(self._gather(self._rows)), None


def prepare_thread(device: torch.device) -> None:
    """For this thread: it computes alone, on this device. OpenMP keeps its number of threads by thread."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
