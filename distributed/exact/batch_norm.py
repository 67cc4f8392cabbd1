"""Batch norm that splits the autograd graph: the parts before and after it run separate backward passes.

The backward pass, like the forward pass, thus stops at every synchronization point, so one thread can run many shards.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from distributed.models.sync_batch_norm import AllGatherRows, Statistics, SyncBatchNorm, gradients
from distributed.models.torch_compat import AnyBatchNorm


class _Root(torch.autograd.Function):
    """A scalar whose backward pass starts from given gradients of some tensors.

    Equivalent to `torch.autograd.backward(tensors, gradients)`, which imports sympy first and takes half a second for it.
    """

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


@dataclass(frozen=True)
class GraphSplit:
    """A shard's forward pass through a batch norm, from whose output its backward pass continues."""

    layer: "SplittingBatchNorm"
    x: Tensor
    output: Tensor
    statistics: Statistics

    def backward(self) -> None:
        """Backpropagate from the output's gradient, which must be complete, to the previous split or the inputs."""
        layer, grad = self.layer, self.output.grad
        assert grad is not None
        weight = layer.weight.detach()
        found = gradients(grad, self.x.detach(), weight, self.statistics, layer.eps, layer.all_gather_rows)
        _Root.apply(found, self.x, layer.weight, layer.bias).backward()


class SplittingBatchNorm(SyncBatchNorm):
    """In training, its output is a leaf of the autograd graph, and the split is appended to `splits`."""

    splits: list[GraphSplit]

    @classmethod
    def splitting(cls, layer: AnyBatchNorm, all_gather_rows: AllGatherRows, splits: list[GraphSplit]) -> Self:
        """Return a replacement for `layer` with the same parameters and buffers."""
        made = cls.of(layer, all_gather_rows)
        made.splits = splits
        return made

    def normalized(self, x: Tensor, statistics: Statistics) -> Tensor:
        with torch.no_grad():
            output = self.apply_statistics(x, statistics)
        self.splits.append(GraphSplit(self, x, output.requires_grad_(), statistics))
        return output


def backward(loss: Tensor, splits: list[GraphSplit]) -> None:
    """Run the backward pass of a shard, which consumes `splits`, last first: no layer depends on one that ran after it.

    Raises:
        RuntimeError: a skip connection bypasses a batch norm, so the graph before it would be traversed twice.
    """
    try:
        loss.backward()  # type: ignore[no-untyped-call]
        while splits:
            splits.pop().backward()
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "exact mode: a skip connection bypasses a batch norm, as in residual networks, which is not supported; use fast "
            "mode: exact.shards = 0"
        ) from error
