"""Capture of a function into a CUDA graph."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], object], *, warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """The graph of one call, which itself computes nothing. Its inputs and results must stay at fixed addresses.

    Args:
        warm_up: calls before that, on the stream of the capture: libraries choose their kernels and take their
            workspaces, communicators and optimizer states come into being.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local: a watchdog of NCCL that queries an event meanwhile must not end the capture.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        call()
    return graph
