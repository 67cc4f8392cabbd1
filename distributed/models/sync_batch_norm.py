"""Batch norm over a batch that is split into shards, on CUDA and on CPU. torch's own SyncBatchNorm rejects CPU tensors.

Each shard computes its statistics with torch's native kernel. One all-gather of short rows and a pairwise combination (Chan,
Golub, LeVeque 1983) then give every shard the statistics of the entire batch. Shards may differ in size and may be empty.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from distributed.models.batch_statistics import Statistics, combined, gradient_terms
from distributed.models.plain_batch_norm import LocalBatchNorm, unsupported_batch_norms
from distributed.models.small_tensors import filled, scratch
from distributed.models.torch_compat import AnyBatchNorm, NormBase

T = TypeVar("T")
_backward_kernel = torch.ops.aten.native_batch_norm_backward.default


class AllGatherRows(Protocol):
    """Gathers one row per shard and reduces them; called with every shard of the batch, one or several at a time."""

    def __call__(self, own_rows: list[Tensor], reduce_fn: Callable[[Tensor], T]) -> T:
        """Return `reduce_fn` of all shards' rows [shards, length], the same result for every shard."""
        ...


def one_shard_per_rank(gather: Callable[[Tensor], Tensor]) -> AllGatherRows:
    """Return an `AllGatherRows` for one shard per rank, given an all-gather of rows ordered by rank."""

    def all_gather_rows(own_rows: list[Tensor], reduce_fn: Callable[[Tensor], T]) -> T:
        (row,) = own_rows
        return reduce_fn(gather(row))

    return all_gather_rows


def statistics_row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean, biased variance and count of x [n, channels, ...], concatenated: [2 * channels + 1]."""
    channels, device = x.shape[1], x.device
    count = x.numel() // channels
    if count:
        # The kernel returns statistics in the dtype of the running ones; without those it would round them to bfloat16.
        unread = scratch(channels, dtype, device)
        mean, variance = torch.batch_norm_update_stats(x, unread, unread, 0.0)
    else:
        mean = variance = filled(channels, 0.0, dtype, device)
    return torch.cat((mean, variance, filled(1, count, dtype, device)))


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Normalize x by given statistics, which are treated as constants."""
    # Not functional.batch_norm, which adds checks and rejects an eps of 0 in torch 2.11.
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)


def grad_sums(grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, eps: float) -> list[Tensor]:
    """Return this shard's sums of grad * x_hat and of grad, [channels]: the gradients of weight and bias."""
    mean, variance, _ = statistics
    if not x.numel():  # the kernel divides by the number of elements
        return [torch.zeros_like(mean), torch.zeros_like(mean)]
    # CUDA's kernel needs a weight but only reads its dtype here: the values matter for the gradient of x, computed later.
    # Without saved statistics the kernel uses those passed as running ones. On CUDA "none" is an empty tensor, not None.
    any_weight, unsaved = mean if weight is None else weight, filled(0, 0.0, mean.dtype, mean.device)
    found = _backward_kernel(grad, x, any_weight, mean, variance, unsaved, unsaved, False, eps, [False, True, True])
    return found[1:]  # type: ignore[no-any-return]


def input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, rows: list[Tensor], layer: "SyncBatchNorm"
) -> Tensor:
    """Return the gradient of x [n, channels, ...], one or several shards. Synchronizes with all other shards.

    Args:
        rows: `grad_sums` of each of these shards, concatenated.
    """

    def reduce_fn(rows: Tensor) -> tuple[Tensor, ...]:
        scale, offset, slope = gradient_terms(rows, weight, statistics, layer.eps, x.dtype)
        zeros, ones = (filled(len(scale), value, scale.dtype, scale.device) for value in (0.0, 1.0))
        return scale, offset, slope.view(1, -1, *(1,) * (x.dim() - 2)), zeros, ones

    scale, offset, slope, zeros, ones = layer.all_gather_rows(rows, reduce_fn)
    # scale * grad + offset is one pass of the kernel that evaluation uses.
    return torch.batch_norm(grad, scale, offset, zeros, ones, False, 0.0, 0.0, False).addcmul_(x, slope)


class _BatchNormalized(torch.autograd.Function):
    """Normalization by statistics of the batch, on which the gradient of x depends too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics, layer: "SyncBatchNorm"
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.layer = statistics, layer
        return normalized(x, weight, bias, statistics.mean, statistics.variance, layer.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; cheaper than once_differentiable
            raise RuntimeError(
                "synchronized batch norm has no second derivative: compute gradients without create_graph=True"
            )
        x, weight = ctx.saved_tensors
        layer, statistics = ctx.layer, ctx.statistics
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        sums = grad_sums(grad, x, weight, statistics, layer.eps)
        # All shards have the same graph, so either all of them need this gradient and synchronize, or none.
        grad_x = input_gradient(grad, x, weight, statistics, [torch.cat(sums)], layer) if needs_x else None
        return grad_x, sums[0] if needs_weight else None, sums[1] if needs_bias else None, None, None


class SyncBatchNorm(NormBase):
    """`BatchNorm1d/2d/3d` over all shards. State, options and results are the same as theirs on the entire batch.

    Without running statistics it normalizes by those of the batch in evaluation too, as torch does: then an evaluation
    synchronizes as well, and its results depend on how it is divided into batches. Gradients of weight and bias are this
    shard's sums; the engine sums them over shards, as for any other parameter.
    """

    all_gather_rows: AllGatherRows

    @classmethod
    def of(cls, layer: AnyBatchNorm, all_gather_rows: AllGatherRows) -> Self:
        """Synchronize `layer` in place and return it: what refers to it, e.g. a list, then refers to a synchronized layer."""
        # DDP rejects torch's own synchronized layers on CPUs.
        plain = LocalBatchNorm if isinstance(layer, nn.SyncBatchNorm) else type(layer)
        layer.__class__ = _synchronized(cls, plain)  # type: ignore[assignment, arg-type]
        sync = cast(Self, layer)
        sync.all_gather_rows = all_gather_rows
        return sync

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a shard, input [n, channels, ...]."""
        weight, bias = self.weight, self.bias
        if not self.training and self.running_mean is not None:
            assert self.running_var is not None
            return normalized(input, weight, bias, self.running_mean, self.running_var, self.eps)
        known = self.running_mean if weight is None else weight
        dtype = torch.promote_types(input.dtype, torch.float32) if known is None else known.dtype
        statistics = self.all_gather_rows([statistics_row(input.detach(), dtype)], self.combine_statistics)
        result: Tensor = _BatchNormalized.apply(input, weight, bias, statistics, self)
        return result

    def count_batch(self) -> Tensor | float | None:
        """Count a batch; return the weight of its statistics in the running ones, or None if there are none to update."""
        if not self.training or not self.track_running_stats:
            return None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is None:
            return None
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 0.0
        # A tensor: reading the number would wait for the device.
        return self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()

    @torch.no_grad()
    def combine_statistics(self, rows: Tensor) -> Statistics:
        """Combine rows into the batch's statistics and update the running ones; once if several shards share them."""
        statistics = combined(rows)
        momentum = self.count_batch()
        if momentum is not None:
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(statistics.mean, momentum)
            self.running_var.lerp_(statistics.variance * statistics.sizes.unbiased, momentum)
        return statistics


@cache
def _synchronized(kind: type[SyncBatchNorm], plain: type[AnyBatchNorm]) -> type[SyncBatchNorm]:
    """Return a subclass of both: networks may ask `isinstance(layer, nn.BatchNorm2d)`."""
    return type(kind.__name__, (kind, plain), {})


def convert_batch_norm(model: nn.Module, convert: Callable[[AnyBatchNorm], Any]) -> None:
    """Call `convert`, which works in place, for every batch norm of the model, torch's own SyncBatchNorm included.

    Raises:
        ValueError: a layer cannot be synchronized; names each of them and the remedy.
    """
    unsupported = unsupported_batch_norms(model)
    if unsupported:
        raise ValueError("synchronized batch norm does not support this model: " + "; ".join(unsupported))
    for layer in model.modules():
        if isinstance(layer, AnyBatchNorm):
            convert(layer)
