"""Synchronized batch norm on CUDA in a dozen kernel launches, built from the kernels of `torch.nn.SyncBatchNorm`.

torch's layer waits for the device in every forward pass, since it drops the rows of empty shards with a mask, and under
autocast an empty shard's row has another dtype. This layer avoids both.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.models.sync_batch_norm import SyncBatchNorm, convert_batch_norm, one_shard_per_rank


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: "FusedSyncBatchNorm") -> Tensor:
        x = _dense(x)
        channels, count = x.shape[1], x.numel() // x.shape[1]
        mean, inverse = (
            torch.batch_norm_stats(x, layer.eps) if count else (weight.new_zeros(channels), weight.new_ones(channels))
        )
        row = torch.cat([mean, inverse, torch.full((1,), count, dtype=mean.dtype, device=mean.device)])
        mean, inverse, counts = layer.all_gather_rows([row], lambda rows: layer.combine_and_track(x, rows))
        ctx.save_for_backward(x, weight, mean, inverse, counts)
        ctx.all_gather_rows = layer.all_gather_rows
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, layer.eps) if count else torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if x.numel():
            grad = _dense(grad, like=x)
            *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
                grad, x, mean, inverse, weight, needs_x, needs_weight, needs_bias
            )
        else:
            sums = [torch.zeros_like(mean)] * 2
            of_weight = of_bias = torch.zeros_like(weight)
        of_parameters = of_weight if needs_weight else None, of_bias if needs_bias else None
        if not needs_x:  # on any rank
            return None, *of_parameters, None
        total: Tensor = ctx.all_gather_rows([torch.cat(sums)], lambda rows: rows.sum(0))
        sum_grad, sum_product = total.chunk(2)
        if not x.numel():
            return torch.empty_like(x), *of_parameters, None
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse, weight, sum_grad, sum_product, counts)
        return grad_x, *of_parameters, None


class FusedSyncBatchNorm(SyncBatchNorm):
    """A `SyncBatchNorm` for CUDA in fast mode: its sums over shards have no fixed order.

    The last gathered row must be that of a shard that is not empty. Its base class computes evaluations, and layers without
    weight, bias or running statistics. It also computes cumulative running statistics, whose momentum is on the device.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a shard, input [n, channels, ...]."""
        if not self._is_fused():
            return super().forward(input)
        result: Tensor = _FusedBatchNorm.apply(input, self.weight, self.bias, self)
        return result

    def _is_fused(self) -> bool:
        tracked = self.track_running_stats and self.running_mean is not None and self.momentum is not None
        return self.training and tracked and self.weight is not None and self.bias is not None

    def combine_and_track(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Combine the shards' rows and update the running statistics.

        Return mean and inverse standard deviation [channels] of the entire batch, and each shard's count, int32 [shards].
        """
        # In reverse order: the kernel divides by the count so far, and only the last shard is certain not to be empty.
        means, inverses, counts = torch.split(rows.flip(0), [x.shape[1], x.shape[1], 1], dim=1)
        self.count_batch()
        assert self.momentum is not None
        assert self.running_var is not None
        # The kernel divides by the count of values minus one. A rank with two values knows that there are more than one.
        of_one_value = self.running_var * (1 - self.momentum) if x.numel() <= x.shape[1] else None  # its variance is 0
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means, inverses, self.running_mean, self.running_var, self.momentum, self.eps, counts.view(-1)
        )
        if of_one_value is not None:
            self.running_var.copy_(torch.where(counts.sum() > 1, self.running_var, of_one_value))
        return mean, inverse, counts.view(-1).to(torch.int32)


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return x in a layout that the kernels accept: channels-last if `like` (default: x) has it, else contiguous."""
    like = x if like is None else like
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if channels_last and like.is_contiguous(memory_format=channels_last):
        return x.contiguous(memory_format=channels_last)
    return x.contiguous()


def synchronize_batch_norm(model: nn.Module, gather: Callable[[Tensor], Tensor]) -> None:
    """Synchronize every batch norm of the model over all ranks, in place, one shard per rank: for fast mode.

    Args:
        gather: all-gather of one row per rank, [world_size, length], ordered by rank. The last rank's shard is never empty.

    Raises:
        ValueError: a batch norm of the model is more than torch's own.
    """
    all_gather_rows = one_shard_per_rank(gather)
    # A layer may have no tensor of its own.
    on_cuda = any(tensor.is_cuda for tensor in chain(model.parameters(), model.buffers()))
    kind = FusedSyncBatchNorm if on_cuda else SyncBatchNorm
    convert_batch_norm(model, partial(kind.of, all_gather_rows=all_gather_rows))
