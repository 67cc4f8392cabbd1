"""Collectives on tensors and Python objects. All but `all_gather` work without a process group, as a single rank."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from distributed.comm.torch_compat import all_gather_single
from distributed.errors import InputError, StorageError

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """All-reduce the sum in place, on the tensor's device. Integer sums are exact in any order."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks_(tensor: Tensor) -> Tensor:
    """All-reduce the elementwise maximum in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_gather(received: Tensor, sent: Tensor) -> None:
    """Fill `received`, flat, with `sent` of every rank in rank order."""
    all_gather_single(received, sent)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable value on every rank. The other ranks' values are ignored."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank. Every rank raises its InputError or StorageError."""
    result, error = _try(work) if rank() == 0 else (None, None)
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return cast(T, result)


def run_on_all(work: Callable[[], T]) -> T:
    """Run `work` on every rank and return the rank's own result, after all ranks are done.

    If `work` raises InputError or StorageError on some ranks, every rank raises the error of the lowest of them.
    """
    result, error = _try(work)
    if first := next((found for found in gather_objects(error) if found is not None), None):
        raise first
    return cast(T, result)


def _try(work: Callable[[], T]) -> tuple[T | None, InputError | StorageError | None]:
    try:
        return work(), None
    except (InputError, StorageError) as error:
        return None, error
