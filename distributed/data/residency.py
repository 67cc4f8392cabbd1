"""Keeps a data set's images on the device or in host memory, and gathers batches from there: bit-identical either way."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed.data.sources.mapped import ReadAhead

T = TypeVar("T")

_BYTES_AT_ONCE = 2**26

Residency = Literal["device", "host"]


@dataclass(frozen=True)
class ResidentSplit:
    """The images and labels of a split; several splits may share the same memory.

    images: uint8 [all, h, w, channels], on the device, or in host memory if `prefetched`: then a batch is gathered and copied
        while the previous one is in use.
    labels: int64 [all], on the device.
    ids: int64 [n], on the device: which of the images are in this split.
    read_ahead: called before images are read, if they are mapped from a file that may not fit into memory.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    prefetched: bool
    read_ahead: ReadAhead | None = None

    def gather(self, ids: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield, on the device, the images of each int64 [n] of `ids`, which may be on the device or the host."""
        if self.prefetched:
            return _prefetched(self, ids, self.ids.device)
        return (torch.index_select(self.images, 0, own) for own in _one_ahead(ids, self.announce))

    def announce(self, ids: Tensor) -> Tensor:
        """Let the system start to read the images of int64 [n] if they are mapped from a file. Returns the ids."""
        if self.read_ahead and not self.images.is_cuda:
            self.read_ahead(ids.numpy())
        return ids

    def ids_for_gather(self, ids: Tensor) -> Tensor:
        """Return ids on the images' device: copied once per epoch, because a copy per batch would wait for the device."""
        return ids.cpu() if self.prefetched else ids


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Return the images in the same memory, which may be mapped from a file and read-only: nothing writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)


def copied(images: Tensor, device: torch.device, read_ahead: ReadAhead | None) -> Tensor:
    """Return the images on the device; mapped ones are read in large pieces, although single rows are announced."""
    if read_ahead is None or device == images.device:
        return images.to(device)
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    at_once = max(1, _BYTES_AT_ONCE // images[:1].nbytes)
    for start in range(0, len(images), at_once):
        stop = min(start + at_once, len(images))
        read_ahead(np.arange(start, stop))
        copy[start:stop].copy_(images[start:stop])
    return copy


def residency(placement: Residency | Literal["auto"], total_bytes: int, device: torch.device) -> Residency:
    """Return `placement` with auto resolved.

    On a CPU, a thread that gathers the next batch would take a core from the training step: 15 % of its speed.
    """
    if placement != "auto":
        return placement
    if device.type != "cuda":
        return "device"  # whose memory is the host's
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if 3 * total_bytes < free else "host"


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all copies to a device.

    Its high priority keeps it out of the pool from which shards take their streams. There is only one because the allocator
    caches memory per stream.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _prefetched(split: ResidentSplit, wanted: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Gather and copy the next batch on a thread, on CUDA in a stream of its own, while the caller uses this one."""
    side = _copy_stream(device) if device.type == "cuda" else None

    def fetch(ids: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        split.announce(ids)
        if side is None:
            return torch.index_select(split.images, 0, ids), None
        # Pinned memory comes from torch's cache, which does not reuse it before the copy from it has ended.
        with torch.cuda.stream(side):
            staging = torch.empty((len(ids), *split.images.shape[1:]), dtype=torch.uint8, pin_memory=True)
            torch.index_select(split.images, 0, ids, out=staging)
            copy = staging.to(device, non_blocking=True)
            return copy, side.record_event()

    def arrived(pending: Future[tuple[Tensor, torch.cuda.Event | None]]) -> Tensor:
        copy, event = pending.result()
        if event is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            copy.record_stream(current)  # else `side` could reuse its memory while it is still read here
        return copy

    with ThreadPoolExecutor(1, "images", _use, (device,)) as thread:
        yield from map(arrived, _one_ahead(wanted, lambda ids: thread.submit(fetch, ids.cpu())))


def _use(device: torch.device) -> None:
    """Select the device for this thread: a new one is on the first GPU, where every rank would open a context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _one_ahead(ids: Iterable[Tensor], start: Callable[[Tensor], T]) -> Iterator[T]:
    """Yield what `start` returns for each of `ids`; the next one is started before it is yielded."""
    started: deque[T] = deque()
    for own in ids:
        started.append(start(own))
        if len(started) > 1:
            yield started.popleft()
    yield from started
