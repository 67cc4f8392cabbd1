"""A backward pass in Python over torch's own autograd graph, which can pause between any two nodes.

torch's engine cannot be suspended, so it would need one thread per shard. Here a shard's pass yields to the next shard inside
batch norm's backward, which is Python, like every `torch.autograd.Function`. Gradients are those of `loss.backward()` bit for
bit: the same nodes run in the same order, and the same additions happen.

Like torch's engine in one thread, it runs ready nodes latest first, and fits each gradient to the input that it belongs to
(torch/csrc/autograd/engine.cpp: `ReadyQueue`, `validate_outputs`). Hooks do not run.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup

from distributed.exact.torch_compat import (
    Node,
    input_metadata,
    is_leaf,
    is_python,
    python_nodes_are_weak,
    sequence_number,
)

GradientSink = Callable[[Tensor, Tensor], None]
"""Takes a parameter and its gradient, complete within the shard; must not modify the gradient in place."""


@torch.no_grad()
def backward(loss: Tensor, sink: GradientSink, before: dict[Node, Callable[[], None]]) -> None:
    """Pass the gradient of every leaf to `sink`, as soon as it is complete.

    What a node saved is freed once it has run, if nothing else refers to the graph; `loss` is detached in place.

    Args:
        loss: a scalar, not a view.
        before: functions to call right before their node runs; consumed.

    Raises:
        RuntimeError: a node computed a gradient that does not fit its input.
    """
    with GraphExecGroup():  # otherwise a checkpointed block would be computed again for each tensor that it saved
        _run_graph(loss, sink, before)


def _run_graph(loss: Tensor, sink: GradientSink, before: dict[Node, Callable[[], None]]) -> None:
    start: Node = loss.grad_fn
    arriving = _Arriving(start)
    arriving.add(start, 0, torch.ones_like(loss))
    loss.detach_()
    ready: list[tuple[int, Node]] = [(0, start)]
    weak, owners = python_nodes_are_weak(), dict[Node, Any]()  # owners keep a node alive until it has run
    del start
    while ready:
        node = heappop(ready)[1]
        if prepare := before.pop(node, None):
            prepare()
        results = _run(node, arriving.take(node))
        owner = (node, owners.pop(node, None)) if weak else None
        del node  # frees what it saved, before the next one runs
        for target, index, gradient in results:
            if weak and is_python(target):
                owners[target] = owner
            if gradient is not None:
                arriving.add(target, index, gradient)
            if not arriving.is_complete(target):
                continue
            if not is_leaf(target):
                heappush(ready, (-sequence_number(target), target))
            elif (total := arriving.take(target)[0]) is not None:
                sink(target.variable, total)
        results.clear()
        target = gradient = total = owner = None


class _Arriving:
    """The gradients that have arrived at nodes which have not run yet."""

    def __init__(self, start: Node) -> None:
        self._uses = {start: 0}
        """How many gradients have yet to arrive at each node."""
        self._slots: dict[Node, tuple[list[Any], list[Tensor | None]]] = {}
        stack = [start]
        while stack:
            for node, _ in stack.pop().next_functions:
                if node in self._uses:
                    self._uses[node] += 1
                elif node is not None:
                    self._uses[node] = 1
                    stack.append(node)

    def add(self, node: Node, index: int, gradient: Tensor) -> None:
        """Add to the gradient of input `index` of the node's forward result."""
        slots = self._slots.get(node)
        if slots is None:
            metadata = input_metadata(node)
            slots = self._slots[node] = metadata, [None] * len(metadata)
        metadata, gradients = slots
        gradient, before = _fit(gradient, metadata[index], node), gradients[index]
        gradients[index] = gradient if before is None else _sum(before, gradient)

    def is_complete(self, node: Node) -> bool:
        """Count one edge to the node as done, and return whether it was the last one."""
        self._uses[node] -= 1
        return not self._uses[node]

    def take(self, node: Node) -> list[Tensor | None]:
        """Return the node's gradients and forget the node."""
        del self._uses[node]
        slots = self._slots.pop(node, None)
        return [None] * len(input_metadata(node)) if slots is None else slots[1]


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum in the strides of the first gradient, like torch's engine, which adds in place.

    Other strides, e.g. of images of one pixel, which are both NCHW and NHWC, would select other kernels further on.
    """
    out = torch.empty_like(first)
    return torch.add(first, second, out=out) if out.stride() == first.stride() else first + second


def _fit(gradient: Tensor, metadata: Any, node: Node) -> Tensor:
    """Sum over dimensions that the forward pass broadcast, and cast to the input's dtype."""
    if list(gradient.shape) != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    if gradient.dtype != metadata.dtype:
        if gradient.is_complex():
            raise RuntimeError(
                f"exact mode: {node.name()} received a complex gradient; use fast mode: exact.shards = 0"
            )
        gradient = gradient.to(metadata.dtype)
    return gradient


def _run(node: Node, gradients: list[Tensor | None]) -> list[tuple[Node, int, Tensor | None]]:
    """Return (node, input index, gradient) for each edge from this node to one that needs a gradient."""
    edges = node.next_functions
    if is_python(node):
        # One result per argument, tensor or not, but one edge per tensor.
        results = zip(_as_tuple(node.apply(*_materialized(node, gradients))), node.needs_input_grad, strict=False)
        of_edges = iter([gradient for gradient, needed in results if needed])
        return [(*edge, next(of_edges)) for edge in edges if edge[0] is not None]
    pairs = zip_longest(edges, _as_tuple(node(*gradients)))
    return [(*edge, gradient) for edge, gradient in pairs if edge[0] is not None]


def _as_tuple(results: Any) -> tuple[Tensor | None, ...]:
    return results if type(results) is tuple else (results,)


def _materialized(node: Node, gradients: list[Tensor | None]) -> list[Tensor]:
    """Replace undefined gradients by zeros, as torch's engine does for every `torch.autograd.Function`."""
    return [
        torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device) if gradient is None else gradient
        for gradient, metadata in zip(gradients, input_metadata(node), strict=True)
    ]
