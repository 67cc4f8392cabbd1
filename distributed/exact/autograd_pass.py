"""A backward pass in Python over torch's own autograd graph, which can pause between any two nodes.

torch's engine cannot be suspended, so it would need one thread per shard. Here a shard's pass yields to the next shard inside
batch norm's backward, which is Python, like every `torch.autograd.Function`. Gradients are those of `loss.backward()` bit for
bit: the same nodes run in the same order, and the same additions happen.

Like torch's engine in one thread, it runs ready nodes latest first, and fits each gradient to the input that it belongs to
(torch/csrc/autograd/engine.cpp: `ReadyQueue`, `validate_outputs`). Hooks do not run.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from distributed.exact.torch_compat import AccumulateGrad, Node, PythonNode, input_metadata, sequence_number

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
    start: Node = loss.grad_fn
    arriving = _Arriving(start)
    arriving.add(start, 0, torch.ones_like(loss))
    loss.detach_()
    ready = [(0, start)]
    del start
    while ready:
        node = heappop(ready)[1]
        gradients = arriving.take(node)
        if prepare := before.pop(node, None):
            prepare()
        edges = node.next_functions
        if isinstance(node, PythonNode):
            results = _run_python_node(node, gradients)
            edges = [edge for edge in edges if edge[0] is not None]
        else:
            results = node(*gradients)
        del node, gradients  # frees what the node saved, before the next one runs
        if type(results) is not tuple:
            results = (results,)
        for (target, index), gradient in zip(edges, results, strict=False):
            if target is None:
                continue
            if gradient is not None:
                arriving.add(target, index, gradient)
            if not arriving.is_complete(target):
                continue
            if type(target) is AccumulateGrad:
                (total,) = arriving.take(target)
                if total is not None:
                    sink(target.variable, total)
            else:
                heappush(ready, (-sequence_number(target), target))
        del edges, results
        target = gradient = None


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
        gradients[index] = gradient if before is None else before + gradient

    def is_complete(self, node: Node) -> bool:
        """Count one edge to the node as done, and return whether it was the last one."""
        self._uses[node] -= 1
        return not self._uses[node]

    def take(self, node: Node) -> list[Tensor | None]:
        """Return the node's gradients and forget the node."""
        del self._uses[node]
        slots = self._slots.pop(node, None)
        return [None] * len(input_metadata(node)) if slots is None else slots[1]


def _fit(gradient: Tensor, metadata: Any, node: Node) -> Tensor:
    """Sum over dimensions that the forward pass broadcast, and cast to the input's dtype."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    if gradient.dtype != metadata.dtype:
        if gradient.is_complex():
            raise RuntimeError(
                f"exact mode: {node.name()} received a complex gradient; use fast mode: exact.shards = 0"
            )
        gradient = gradient.to(metadata.dtype)
    return gradient


def _run_python_node(node: Node, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Run the backward of a `torch.autograd.Function`; return the gradients of the inputs that need one, in order.

    Undefined gradients become zeros, as in torch's engine.
    """
    for index, metadata in enumerate(input_metadata(node)):
        if gradients[index] is None:
            gradients[index] = torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)
    results = node.apply(*gradients)
    if type(results) is not tuple:
        results = (results,)
    return tuple(gradient for gradient, needed in zip(results, node.needs_input_grad, strict=False) if needed)
