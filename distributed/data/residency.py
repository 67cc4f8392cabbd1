"""Where images lie, on the device or in host memory, and how those of a batch come to the device: the same bits."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Placement = Literal["auto", "device", "host"]


@dataclass(frozen=True)
class ResidentSplit:
    """A split's images and labels; those of several splits may be cut from the same memory.

    images: uint8 [all, h, w, 3] of the file, on the device or, where `ahead`, in host memory, from which a batch is
    gathered and copied while the one before is computed on; labels: int64 [all] and ids: int64 [n], which of them
    belong to this split, both on the device.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    ahead: bool

    def chosen(self, wanted: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each of `wanted`, int64 [n] on the device or in host memory; they come on the device."""
        if self.ahead:
            return _one_ahead(self.images, wanted, self.ids.device)
        return (self.images.index_select(0, ids) for ids in wanted)


def place(placement: Placement, bytes_in_all: int, device: torch.device) -> Literal["device", "host"]:
    """`placement` with auto resolved."""
    if placement != "auto":
        return placement
    if device.type != "cuda":
        return "device"  # the device's memory is the host's
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if 3 * bytes_in_all < free else "host"


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies to a device. Of high priority, whose pool of streams is not the one that shards take theirs
    from; and one for all, since the allocator keeps memory by stream."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def _one_ahead(images: Tensor, wanted: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """A thread gathers and copies the next batch while the caller computes on this one; on CUDA in a stream of its own."""
    side = _copy_stream(device) if device.type == "cuda" else None

    def fetch(ids: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if side is None:
            return images.index_select(0, ids), None
        # Pinned memory comes from torch's cache, which gives it out again only when the copy from it is over.
        with torch.cuda.stream(side):  # and its device: a thread begins on the first one
            staging = torch.empty((len(ids), *images.shape[1:]), dtype=torch.uint8, pin_memory=True)
            torch.index_select(images, 0, ids, out=staging)
            copy = staging.to(device, non_blocking=True)
            return copy, side.record_event()

    def arrived(pending: Future[tuple[Tensor, torch.cuda.Event | None]]) -> Tensor:
        copy, event = pending.result()
        if event is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            copy.record_stream(current)  # else its memory could be given out again in `side` while still read here
        return copy

    with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        pending: deque[Future[tuple[Tensor, torch.cuda.Event | None]]] = deque()
        for ids in wanted:
            pending.append(thread.submit(fetch, ids.cpu()))
            if len(pending) > 1:
                yield arrived(pending.popleft())
        while pending:
            yield arrived(pending.popleft())
