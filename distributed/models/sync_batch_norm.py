"""Batch norm over a batch that is cut into shards, on CUDA and on CPU alike: torch's own refuses CPU tensors in training.

Each shard takes its statistics with torch's native kernel; one exchange of small rows and a pairwise combination (Chan,
Golub, LeVeque 1983) give everybody those of the whole batch, from any shards, empty ones too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.comm.reduction_tree import tree_sum

T = TypeVar("T")


class BucketReduce(Protocol):
    """Called by every shard of the batch with its row; returns `combine` of all rows [shards, len(row)], to each alike."""

    def __call__(self, row: Tensor, combine: Callable[[Tensor], T]) -> T: ...


def by_ranks(gather: Callable[[Tensor], Tensor]) -> BucketReduce:
    """The exchange where each rank is one shard, from a gather of every rank's row in order of rank."""

    def exchange(row: Tensor, combine: Callable[[Tensor], T]) -> T:
        return combine(gather(row))

    return exchange


class Statistics(NamedTuple):
    """Of the whole batch: mean and biased variance [channels], how many numbers a channel []."""

    mean: Tensor
    variance: Tensor
    total: Tensor


def _row_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean, biased variance and count of x [n, channels, ...], side by side."""
    channels = x.shape[1]
    count = x.numel() // channels
    mean = variance = torch.zeros(channels, dtype=dtype, device=x.device)
    if count:
        # The kernel gives statistics in the type of the running ones; without these it would round them to bfloat16.
        mean, variance = torch.batch_norm_update_stats(x, mean, variance, 0.0)
    return torch.cat([mean.to(dtype), variance.to(dtype), torch.full((1,), count, dtype=dtype, device=x.device)])


def _combined(rows: Tensor) -> Statistics:
    """The whole batch's statistics from the shards' rows."""
    channels = rows.shape[1] // 2
    means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    total = tree_sum(counts)
    parts = counts / total
    mean = tree_sum(means * parts)
    # Deviations of the shards' means from the whole's, not a difference of squares: nothing cancels.
    variance = tree_sum((variances + (means - mean).square()) * parts)
    return Statistics(mean, variance, total[0])


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, statistics: Statistics, eps: float, exchange: BucketReduce
) -> tuple[Tensor, Tensor, Tensor]:
    """A shard's gradients of x [n, channels, ...], of weight and of bias, from that of its result; meets all other shards.

    Those of weight and bias are this shard's sums.
    """
    mean, variance, total = statistics
    grad_weight = grad_bias = torch.zeros_like(mean)
    if x.numel():  # the kernel divides by the number of elements
        # With nothing saved it takes the statistics passed as running ones; on CUDA that is an empty tensor, not None.
        unsaved = mean.new_empty(0)
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, unsaved, unsaved, False, eps, [False, True, True]
        )

    def combine(rows: Tensor) -> tuple[Tensor, ...]:
        # (grad - mean_bias - x_hat * mean_weight) * weight * inverse, written per channel as scale * grad + offset, one
        # pass of the kernel that evaluation uses, and slope * x on top of it. The slope is rounded to x's type before
        # the offset is made of it, so that the rounding meets x - mean, not x.
        mean_weight, mean_bias = (tree_sum(rows) / total).chunk(2)
        inverse = torch.rsqrt(variance + eps)
        scale = weight * inverse
        slope = (-mean_weight * scale * inverse).to(x.dtype)
        offset = -mean_bias * scale - slope.to(mean.dtype) * mean
        return scale, offset, slope.view(1, -1, *(1,) * (x.dim() - 2)), torch.zeros_like(mean), torch.ones_like(mean)

    scale, offset, slope, zeros, ones = exchange(torch.cat([grad_weight, grad_bias]), combine)
    # Not functional.batch_norm: in torch 2.11 that refuses an eps of 0.
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
        ctx.eps, ctx.exchange = layer.eps, layer.exchange
        return layer.apply_statistics(x, Statistics(mean, variance, total))  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        return *gradients(grad, x, weight, Statistics(*statistics), ctx.eps, ctx.exchange), None, None, None, None


class SyncBatchNorm(nn.modules.batchnorm._NormBase):
    """`BatchNorm1d/2d/3d` over all shards in training; in evaluation the same as theirs. The state is theirs too.

    Gradients of weight and bias are this shard's sums: adding them up over shards is the engine's part, as for any weight.
    """

    exchange: BucketReduce

    @classmethod
    def of(cls, layer: nn.modules.batchnorm._BatchNorm, exchange: BucketReduce) -> Self:
        """The synchronized layer with the same parameters and buffers (the very tensors).

        Raises:
            ValueError: a layer without affine parameters or running statistics.
        """
        if not layer.affine or not layer.track_running_stats:
            raise ValueError(f"{layer}: synchronized batch norm needs affine=True and track_running_stats=True")
        sync = cls(layer.num_features, eps=layer.eps, momentum=layer.momentum, device="meta")
        sync.exchange = exchange
        sync._parameters, sync._buffers, sync.training = layer._parameters, layer._buffers, layer.training
        return sync

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, ...], a shard."""
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            return self.apply_statistics(x, Statistics(self.running_mean, self.running_var, x.new_empty(0)))
        return self.normalized(x, self.exchange(_row_of(x.detach(), self.weight.dtype), self._combined))

    def normalized(self, x: Tensor, statistics: Statistics) -> Tensor:
        """x by the statistics of the batch that it is a part of."""
        result: Tensor = _Normalized.apply(x, self.weight, self.bias, *statistics, self)
        return result

    def apply_statistics(self, x: Tensor, statistics: Statistics) -> Tensor:
        """x by given statistics, which are taken as constants."""
        return torch.nn.functional.batch_norm(
            x, statistics.mean, statistics.variance, self.weight, self.bias, training=False, eps=self.eps
        )

    @torch.no_grad()
    def _combined(self, rows: Tensor) -> Statistics:
        """The whole batch's statistics, taken into the running ones: once, where several shards share these."""
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


def convert_batch_norm(model: nn.Module, into: Callable[[nn.modules.batchnorm._BatchNorm], nn.Module]) -> nn.Module:
    """Put another layer in place of every `BatchNorm1d/2d/3d` inside the model."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, into(child))
        else:
            convert_batch_norm(child, into)
    return model
