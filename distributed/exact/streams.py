"""A CUDA stream for each shard: shards that are too small to fill a GPU compute side by side once a step is recorded.

On its own stream a shard runs the very kernels it runs alone, so its bits stay. Shards wait for the caller's stream where they
begin or go on, and the caller's waits for them where they meet: memory of either may be used by the other in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ShardStreams:
    """The streams of this rank's shards; nothing on a CPU, or for a single shard."""

    def __init__(self, shards: int, device: torch.device) -> None:
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda" and shards > 1:
            self._streams = [torch.cuda.Stream(device) for _ in range(shards)]  # type: ignore[no-untyped-call]

    def fork(self) -> None:
        """Let every shard's next kernels wait for what the current stream has been given."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def join(self) -> None:
        """Let the current stream wait for what every shard's has been given."""
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextmanager
    def of(self, shard: int) -> Iterator[None]:
        """Launch on the shard's stream, counted among this rank's shards."""
        if self._streams:
            with torch.cuda.stream(self._streams[shard]):
                yield
        else:
            yield
