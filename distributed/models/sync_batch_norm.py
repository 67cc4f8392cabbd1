"""Batch norm over a batch that is split into shards, on CUDA and on CPU. torch's own SyncBatchNorm rejects CPU tensors.

Each shard computes its statistics with torch's native kernel. One all-gather of short rows and a pairwise combination (Chan,
Golub, LeVeque 1983) then give every shard the statistics of the entire batch. Shards may differ in size and may be empty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.comm.reduction_tree import tree_sum
from distributed.models.torch_compat import AnyBatchNorm, NormBase, share_tensors

T = TypeVar("T")


class AllGatherRows(Protocol):
    """Gathers one row per shard and reduces them; called by every shard of the batch."""

    def __call__(self, row: Tensor, reduce_fn: Callable[[Tensor], T]) -> T:
        """Return `reduce_fn` of all shards' rows [shards, length], the same result for every shard."""
        ...


def one_shard_per_rank(gather: Callable[[Tensor], Tensor]) -> AllGatherRows:
    """Return an `AllGatherRows` for one shard per rank, given an all-gather of rows ordered by rank."""

    def all_gather_rows(row: Tensor, reduce_fn: Callable[[Tensor], T]) -> T:
        return reduce_fn(gather(row))

    return all_gather_rows


class Statistics(NamedTuple):
    """Mean and biased variance [channels] of the entire batch, and the number of elements per channel []."""

    mean: Tensor
    variance: Tensor
    total: Tensor


def _statistics_row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean, biased variance and count of x [n, channels, ...], concatenated: [2 * channels + 1]."""
    channels = x.shape[1]
    count = x.numel() // channels
    mean = variance = torch.zeros(channels, dtype=dtype, device=x.device)
    if count:
        # The kernel returns statistics in the dtype of the running ones; without those it would round them to bfloat16.
        mean, variance = torch.batch_norm_update_stats(x, mean, variance, 0.0)
    return torch.cat([mean.to(dtype), variance.to(dtype), torch.full((1,), count, dtype=dtype, device=x.device)])


def _combined(rows: Tensor) -> Statistics:
    """Combine the shards' rows into the statistics of the entire batch."""
    channels = rows.shape[1] // 2
    means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    total = tree_sum(counts)
    fractions = counts / total
    mean = tree_sum(means * fractions)
    # Squared deviations of the shards' means from the batch's instead of a difference of squares, which would cancel.
    variance = tree_sum((variances + (means - mean).square()) * fractions)
    return Statistics(mean, variance, total[0])


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Statistics, eps: float, all_gather_rows: AllGatherRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a shard's gradients of x [n, channels, ...], weight and bias, given the gradient of its output.

    Synchronizes with all other shards. The gradients of weight and bias are this shard's sums.
    """
    mean, variance, total = statistics
    grad_weight = grad_bias = torch.zeros_like(mean)
    if x.numel():  # the kernel divides by the number of elements
        # Without saved statistics the kernel uses those passed as running ones. On CUDA "none" is an empty tensor, not None.
        unsaved = mean.new_empty(0)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, unsaved, unsaved, False, eps, [False, True, True]
        )

    def reduce_fn(rows: Tensor) -> tuple[Tensor, ...]:
        # grad_x = (grad - mean_bias - x_hat * mean_weight) * weight * inverse, written per channel as
        # scale * grad + offset, one pass of the kernel that evaluation uses, plus slope * x. The slope is rounded to
        # x's dtype before the offset is computed from it, so that its rounding error multiplies x - mean instead of x.
        mean_weight, mean_bias = (tree_sum(rows) / total).chunk(2)
        inverse = torch.rsqrt(variance + eps)
        scale = weight * inverse
        slope = (-mean_weight * scale * inverse).to(x.dtype)
        offset = -mean_bias * scale - slope.to(mean.dtype) * mean
        return scale, offset, slope.view(1, -1, *(1,) * (x.dim() - 2)), torch.zeros_like(mean), torch.ones_like(mean)

    scale, offset, slope, zeros, ones = all_gather_rows(torch.cat([grad_weight, grad_bias]), reduce_fn)
    # Not functional.batch_norm, which rejects an eps of 0 in torch 2.11.
    grad_x = torch.batch_norm(
        grad, scale, offset, zeros, ones, training=False, momentum=0.0, eps=0.0, cudnn_enabled=False
    ).addcmul_(x, slope)
    return grad_x, grad_weight, grad_bias


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, total: Tensor, layer: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.all_gather_rows = layer.eps, layer.all_gather_rows
        return layer.apply_statistics(x, Statistics(mean, variance, total))  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        found = gradients(grad, x, weight, Statistics(*statistics), ctx.eps, ctx.all_gather_rows)
        return *found, None, None, None, None


class SyncBatchNorm(NormBase):
    """`BatchNorm1d/2d/3d` over all shards in training. Evaluation and state are the same as theirs.

    Gradients of weight and bias are this shard's sums; the engine sums them over shards, as for any other parameter.
    """

    all_gather_rows: AllGatherRows

    @classmethod
    def of(cls, layer: AnyBatchNorm, all_gather_rows: AllGatherRows) -> Self:
        """Return a synchronized replacement for `layer` that shares its parameters and buffers.

        Raises:
            ValueError: the layer has no affine parameters or no running statistics.
        """
        if not layer.affine or not layer.track_running_stats:
            raise ValueError(f"{layer}: synchronized batch norm needs affine=True and track_running_stats=True")
        sync = cls(layer.num_features, eps=layer.eps, momentum=layer.momentum, device="meta")
        sync.all_gather_rows = all_gather_rows
        sync.training = layer.training
        share_tensors(layer, sync)
        return sync

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a shard, x [n, channels, ...]."""
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            return self.apply_statistics(x, Statistics(self.running_mean, self.running_var, x.new_empty(0)))
        row = _statistics_row(x.detach(), self.weight.dtype)
        return self.normalized(x, self.all_gather_rows(row, self._combine_and_track))

    def normalized(self, x: Tensor, statistics: Statistics) -> Tensor:
        """Normalize x by the statistics of its batch. The gradient of x includes their dependence on it."""
        result: Tensor = _Normalized.apply(x, self.weight, self.bias, *statistics, self)
        return result

    def apply_statistics(self, x: Tensor, statistics: Statistics) -> Tensor:
        """Normalize x by given statistics, which are treated as constants."""
        return torch.nn.functional.batch_norm(
            x, statistics.mean, statistics.variance, self.weight, self.bias, training=False, eps=self.eps
        )

    @torch.no_grad()
    def _combine_and_track(self, rows: Tensor) -> Statistics:
        """Combine rows into the batch's statistics and update the running ones; once if several shards share them."""
        statistics = _combined(rows)
        mean, variance, total = statistics
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (total / (total - 1).clamp(min=1)), momentum)
        return statistics


def convert_batch_norm(model: nn.Module, convert: Callable[[AnyBatchNorm], nn.Module]) -> nn.Module:
    """Replace every `BatchNorm1d/2d/3d` inside the model by the layer that `convert` returns for it; return the model."""
    for name, child in model.named_children():
        if isinstance(child, AnyBatchNorm):
            setattr(model, name, convert(child))
        else:
            convert_batch_norm(child, convert)
    return model
