"""Captures a function as a CUDA graph."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], object], *, warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Return the graph of one call. Capturing computes nothing; inputs and results must stay at fixed addresses.

    Args:
        warm_up: calls before the capture, on the same stream, in which libraries choose kernels and allocate workspaces,
            and communicators and optimizer states are created.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local: NCCL's watchdog may query an event meanwhile, which must not end the capture.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        call()
    return graph
