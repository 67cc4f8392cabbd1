"""Sums and agreements over ranks. No-ops in a single process, so that callers need not know how many there are."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.errors import InputError, StorageError

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Replace by the sum over ranks, on the tensor's device. Exact in any order for integers."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks_(tensor: Tensor) -> Tensor:
    """Replace by the elementwise maximum over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_gather(received: Tensor, sent: Tensor) -> None:
    """Fill `received`, flat, with what every rank sent, in order of rank."""
    # torch 2.14 renamed the function and warns about its old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, sent)


def from_main(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in order of rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def decided_by_main(work: Callable[[], T]) -> T:
    """Rank 0's result, on every rank. An error of input or storage that rank 0 meets, every rank raises."""
    result, error = _tried(work) if rank() == 0 else (None, None)
    result, error = from_main((result, error))
    if error is not None:
        raise error
    return cast(T, result)


def done_by_all(work: Callable[[], T]) -> T:
    """This rank's own result, once every rank has one. The first rank's error of input or storage, every rank raises."""
    result, error = _tried(work)
    if first := next((found for found in gather_objects(error) if found is not None), None):
        raise first
    return cast(T, result)


def _tried(work: Callable[[], T]) -> tuple[T | None, InputError | StorageError | None]:
    try:
        return work(), None
    except (InputError, StorageError) as error:
        return None, error


class LateMax:
    """An elementwise maximum over ranks of a few flags, read one call late, so that nobody waits for it.

    It has a gloo group of its own: flags are host numbers, and the gradients' group stays free.
    """

    def __init__(self, flags: int) -> None:
        self._nothing = torch.zeros(flags, dtype=torch.int32)
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, *flags: int) -> list[int]:
        """Hand in this rank's flags; get the maxima of what was handed in the call before (zeros at first)."""
        before = self.drain()
        mine = torch.tensor(flags, dtype=torch.int32)
        work = (
            dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True) if world_size() > 1 else None
        )
        self._pending = (mine, work)
        return before

    def drain(self) -> list[int]:
        """The maxima of what was handed in last, waiting for them."""
        if self._pending is None:
            return [int(flag) for flag in self._nothing]
        flags, work = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        return [int(flag) for flag in flags.tolist()]
