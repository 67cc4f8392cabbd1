"""One CUDA stream per shard: shards too small to fill a GPU run in parallel once a step is captured.

A shard runs the same kernels on its own stream, so its bits do not change. Shards wait for the caller's stream when they start
or resume; the caller's stream waits for them at barriers, so they may use each other's memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ShardStreams:
    """The streams of this rank's shards. Does nothing on a CPU or for a single shard."""

    def __init__(self, shards: int, device: torch.device) -> None:
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda" and shards > 1:
            self._streams = [torch.cuda.Stream(device) for _ in range(shards)]  # type: ignore[no-untyped-call]

    def fork(self) -> None:
        """Make every shard's stream wait for the work queued on the current stream."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def join(self) -> None:
        """Make the current stream wait for the work queued on every shard's stream."""
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextmanager
    def use(self, shard: int) -> Iterator[None]:
        """Launch kernels on the stream of this rank's shard number `shard`. Context manager."""
        if self._streams:
            with torch.cuda.stream(self._streams[shard]):
                yield
        else:
            yield
