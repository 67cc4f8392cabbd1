"""Batch norm over the batch of all ranks, on CUDA and on CPU alike: torch's own refuses CPU tensors in training.

Each rank takes the statistics of its shard with torch's native kernel; one all-gather of small rows and a pairwise
combination (Chan, Golub, LeVeque 1983) give everybody those of the whole batch, from any shards, empty ones too.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Gather = Callable[[Tensor], Tensor]
"""Takes this rank's row, returns every rank's in order of rank: [world_size, len(row)]."""


def _tree_sum(rows: Tensor) -> Tensor:
    """The sum of the rows in one fixed binary tree."""
    while len(rows) > 1:
        paired = rows[: len(rows) // 2 * 2].view(-1, 2, *rows.shape[1:]).sum(1)
        rows = torch.cat([paired, rows[-1:]]) if len(rows) % 2 else paired
    return rows[0]


def _statistics(x: Tensor, dtype: torch.dtype, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks' shards of x [n, channels, ...]: [channels], [channels], []."""
    channels = x.shape[1]
    count = x.numel() // channels
    mean = variance = torch.zeros(channels, dtype=dtype, device=x.device)
    if count:
        # The kernel gives statistics in the type of the running ones; without these it would round them to bfloat16.
        mean, variance = torch.batch_norm_update_stats(x, mean, variance, 0.0)
    row = torch.cat([mean.to(dtype), variance.to(dtype), torch.full((1,), count, dtype=dtype, device=x.device)])
    rows = gather(row)
    means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    total = _tree_sum(counts)
    mean = _tree_sum(means * (counts / total))
    # Deviations of the shards' means from the whole's, not a difference of squares: nothing cancels.
    variance = _tree_sum((variances + (means - mean).square()) * (counts / total))
    return mean, variance, total[0]


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        total: Tensor,
        eps: float,
        gather: Gather,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.gather = eps, gather
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        inverse = torch.rsqrt(variance + ctx.eps)
        grad_weight = grad_bias = torch.zeros_like(mean)
        if x.numel():  # the kernel divides by the number of elements
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
            )
        sums = _tree_sum(ctx.gather(torch.cat([grad_weight, grad_bias]))) / total
        mean_weight, mean_bias = sums.chunk(2)
        # (grad - mean_bias - x_hat * mean_weight) * weight * inverse, written per channel as scale * grad + offset, one
        # pass of the kernel that evaluation uses, and slope * x on top of it. The slope is rounded to x's type before
        # the offset is made of it, so that the rounding meets x - mean, not x.
        scale = weight * inverse
        slope = (-mean_weight * scale * inverse).to(x.dtype)
        offset = -mean_bias * scale - slope.to(mean.dtype) * mean
        zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
        # Not functional.batch_norm: in torch 2.11 that refuses an eps of 0.
        grad_x = torch.batch_norm(
            grad, scale, offset, zeros, ones, training=False, momentum=0.0, eps=0.0, cudnn_enabled=False
        ).addcmul_(x, slope.view(1, -1, *(1,) * (x.dim() - 2)))
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class SyncBatchNorm(nn.modules.batchnorm._NormBase):
    """`BatchNorm1d/2d/3d` over all ranks' shards in training; in evaluation the same as theirs. The state is theirs too.

    Gradients of weight and bias are this shard's sums: adding them up over ranks is the engine's part, as for any weight.
    """

    gather: Gather

    @classmethod
    def of(cls, layer: nn.modules.batchnorm._BatchNorm, gather: Gather) -> Self:
        """The synchronized layer with the same parameters and buffers (the very tensors).

        Raises:
            ValueError: a layer without affine parameters or running statistics.
        """
        if not layer.affine or not layer.track_running_stats:
            raise ValueError(f"{layer}: synchronized batch norm needs affine=True and track_running_stats=True")
        sync = cls(layer.num_features, eps=layer.eps, momentum=layer.momentum, device="meta")
        sync.gather = gather
        sync._parameters, sync._buffers, sync.training = layer._parameters, layer._buffers, layer.training
        return sync

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, ...], this rank's shard."""
        weight, bias = self.weight, self.bias
        if not self.training:
            return torch.nn.functional.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, training=False, eps=self.eps
            )
        with torch.no_grad():
            mean, variance, total = _statistics(x, weight.dtype, self.gather)
            self._track(mean, variance * (total / (total - 1).clamp(min=1)))
        result: Tensor = _SyncBatchNorm.apply(x, weight, bias, mean, variance, total, self.eps, self.gather)
        return result

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased, momentum)


def convert_sync_batch_norm(model: nn.Module, gather: Gather) -> nn.Module:
    """Put `SyncBatchNorm` in place of every `BatchNorm1d/2d/3d` inside the model; parameters and names stay."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, SyncBatchNorm.of(child, gather))
        else:
            convert_sync_batch_norm(child, gather)
    return model
