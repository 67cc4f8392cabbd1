"""Batch norm that cuts the autograd graph: what comes before it and what comes after are differentiated one by one.

So the backward pass, like the forward pass, is at rest wherever the shards meet, and one thread can carry many of them.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from distributed.models.sync_batch_norm import BucketReduce, Statistics, SyncBatchNorm, gradients


class _Seed(torch.autograd.Function):
    """A scalar whose backward pass hands each of some tensors a given gradient.

    As `torch.autograd.backward(tensors, gradients)` does, which imports sympy first, for half a second.
    """

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


@dataclass(frozen=True)
class Cut:
    """One pass of a shard through a layer."""

    layer: "CuttingBatchNorm"
    x: Tensor
    result: Tensor
    statistics: Statistics

    def backward(self) -> None:
        """From the result's gradient, which must be whole, to those of all that lies before, up to the next cut."""
        layer, grad = self.layer, self.result.grad
        assert grad is not None
        weight = layer.weight.detach()
        found = gradients(grad, self.x.detach(), weight, self.statistics, layer.eps, layer.exchange)
        _Seed.apply(found, self.x, layer.weight, layer.bias).backward()


class CuttingBatchNorm(SyncBatchNorm):
    """Its result in training is a leaf of the graph; the way on is written to `cuts`."""

    cuts: list[Cut]

    @classmethod
    def cutting(cls, layer: nn.modules.batchnorm._BatchNorm, exchange: BucketReduce, cuts: list[Cut]) -> Self:
        """In place of `layer`, with its parameters and buffers."""
        made = cls.of(layer, exchange)
        made.cuts = cuts
        return made

    def normalized(self, x: Tensor, statistics: Statistics) -> Tensor:
        with torch.no_grad():
            result = self.apply_statistics(x, statistics)
        self.cuts.append(Cut(self, x, result.requires_grad_(), statistics))
        return result


def backward(loss: Tensor, cuts: list[Cut]) -> None:
    """The backward pass of a shard. A layer that ran later never depends on one that ran before, so last comes first.

    Raises:
        RuntimeError: a connection goes around a layer, so that what lies before it would be passed through twice.
    """
    try:
        loss.backward()  # type: ignore[no-untyped-call]
        while cuts:
            cuts.pop().backward()
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError("exact mode: no connection may go around a batch norm, as in a residual network") from error
