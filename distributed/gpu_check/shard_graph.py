"""Captures eight shards as branches of one CUDA graph, compares each shard's bits with those alone, and times a replay."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed.gpu_check.checks import Checks
from distributed.gpu_check.differences import same_bits
from distributed.gpu_check.timing import milliseconds

SHARDS = 8


def run(checks: Checks) -> None:
    """Assert that captured shards give the same bits as shards computed alone; time replays and eager calls."""
    rows, channels, side = (2, 8, 8) if checks.tiny else (16, 64, 16)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        xs, weights = _inputs(rows, channels, side, dtype, checks.device)

        def shard(index: int, xs: list[Tensor] = xs, weights: list[Tensor] = weights) -> list[Tensor]:
            return _forward_backward(xs[index], weights)

        with checks.check(f"8 shards in eager mode, {name}: repeatable") as figures, torch.no_grad():
            alone = [shard(index) for index in range(SHARDS)]
            for index, before in enumerate(alone):
                assert all(map(same_bits, shard(index), before)), f"shard {index}"
            figures["ms"] = milliseconds(checks, lambda shard=shard: [shard(i) for i in range(SHARDS)])  # type: ignore[misc]
        if checks.is_cuda:
            for order, streams in (("one after the other", 1), ("on 8 streams", SHARDS)):
                with checks.check(f"8 shards in one CUDA graph {order}, {name}") as figures, torch.no_grad():
                    graph, results = _captured(checks.device, shard, streams)
                    figures["ms per replay"] = milliseconds(checks, graph.replay)
                    for index, before in enumerate(alone):
                        assert all(map(same_bits, results[index], before)), (
                            f"shard {index}: differs from the shard alone"
                        )


def _inputs(
    rows: int, channels: int, side: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each shard's images, and the weights of two convolutions and a linear layer, all in channels_last."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        tensor = (torch.randn(shape, generator=generator) / 8).to(device, dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    xs = [random(rows, channels, side, side) for _ in range(SHARDS)]
    pooled = channels * (side // 2) ** 2
    return xs, [random(channels, channels, 3, 3), random(channels, channels, 5, 5), random(32, pooled)]


def _forward_backward(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return the result and all gradients of two convolutions, a pooling and a linear layer.

    Without autograd, which has threads of its own.
    """
    first, second, linear = weights
    a = F.conv2d(x, first, padding=1)
    hidden = a.relu()
    b = F.conv2d(hidden, second, padding=2)
    pooled, indices = F.max_pool2d(b.relu(), 2, return_indices=True)
    flat = pooled.flatten(1)
    y = F.linear(flat, linear)
    grad_linear = y.t() @ flat  # the gradient of y.square().sum() / 2
    grad_pooled = (y @ linear).view(pooled.shape).contiguous(memory_format=torch.channels_last)
    aten = torch.ops.aten
    grad_b = aten.max_pool2d_with_indices_backward(
        grad_pooled, b.relu(), [2, 2], [2, 2], [0, 0], [1, 1], False, indices
    )
    grad_b = grad_b * (b > 0)
    grad_hidden, grad_second, _ = aten.convolution_backward(
        grad_b, hidden, second, None, [1, 1], [2, 2], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    _, grad_first, _ = aten.convolution_backward(
        grad_hidden * (a > 0), x, first, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return [y, grad_linear, grad_second, grad_first]


def _captured(
    device: torch.device, shard: Callable[[int], list[Tensor]], streams: int
) -> tuple[torch.cuda.CUDAGraph, list[list[Tensor]]]:
    """Return a graph of all shards, distributed over the streams, and the tensors that a replay writes."""
    branches = [torch.cuda.Stream(device) for _ in range(streams)]  # type: ignore[no-untyped-call]
    results: list[list[Tensor]] = []

    def fork_and_join() -> None:
        main = torch.cuda.current_stream(device)
        for branch in branches:
            branch.wait_stream(main)
        for index in range(SHARDS):
            with torch.cuda.stream(branches[index % streams]):
                results.append(shard(index))
        for branch in branches:
            main.wait_stream(branch)

    # cuBLAS and cuDNN create handles and workspaces per stream, so the first calls on these streams are not captured.
    warm = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    warm.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(warm):
        fork_and_join()
    torch.cuda.current_stream(device).wait_stream(warm)
    torch.cuda.synchronize(device)
    results.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fork_and_join()
    for result in (tensor for shard_results in results for tensor in shard_results):
        result.zero_()  # so that only a replay can fill them
    torch.cuda.synchronize(device)
    return graph, results
