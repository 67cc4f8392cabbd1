"""Layers whose input may be a group of shards: everything that sums over samples is computed shard by shard.

These sums are the gradients of weights and batch norm's statistics. All else is computed for the group at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distributed.exact.shard_group import ShardGroup, current_group
from distributed.models.sync_batch_norm import SyncBatchNorm, grad_sums, input_gradient, normalized, statistics_row

_convolution_backward = torch.ops.aten.convolution_backward.default


class _PerShardGradients(torch.autograd.Function):
    """A layer whose weight gradients go to the group's sink, shard by shard, instead of through the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any, group: ShardGroup) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.group = layer, group
        return layer.plain_forward(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer, group = ctx.layer, ctx.group
        parts = zip(group.split(x), group.split(grad), strict=True)
        of_shards = [layer.parameter_gradients(x_part, grad_part) for x_part, grad_part in parts]
        for parameter, *gradients in zip(_trainable(layer), *of_shards, strict=True):
            group.hand_over(parameter, gradients)
        return layer.input_gradient(x, grad) if ctx.needs_input_grad[0] else None, None, None, None


def _trainable(layer: Any) -> list[Tensor]:
    """Return the trainable parameters, in the order of the gradients from `parameter_gradients`."""
    return [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]


class _Grouped:
    """Forward of a layer that may get a group of shards."""

    weight: Tensor
    plain_forward: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        group = current_group()
        if group is None:
            return self.plain_forward(x)
        # The cast that autocast would insert, here as a node of its own.
        result: Tensor = _PerShardGradients.apply(x.to(self.weight.dtype), self.weight, self, group)
        return result


class GroupedConv2d(_Grouped, nn.Conv2d):
    """`nn.Conv2d` of a shard or of a group of shards."""

    plain_forward = nn.Conv2d.forward

    def parameter_gradients(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        wanted = [p is not None and p.requires_grad for p in (self.weight, self.bias)]
        gradients = self._backward(x, grad, [False, *wanted])[1:]
        return [gradient for gradient, is_wanted in zip(gradients, wanted, strict=True) if is_wanted]

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        gradient: Tensor = self._backward(x, grad, [True, False, False])[0]
        return gradient

    def _backward(self, x: Tensor, grad: Tensor, wanted: list[bool]) -> tuple[Any, ...]:
        bias_sizes = None if self.bias is None else self.bias.shape
        return _convolution_backward(  # type: ignore[no-any-return]
            grad,
            x,
            self.weight,
            bias_sizes,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            wanted,
        )


class GroupedLinear(_Grouped, nn.Linear):
    """`nn.Linear` of a shard or of a group of shards, for rows [n, in_features]."""

    plain_forward = nn.Linear.forward

    def parameter_gradients(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        found = []
        if self.weight.requires_grad:
            found.append(grad.t().mm(x))
        if self.bias is not None and self.bias.requires_grad:
            found.append(grad.sum_to_size(self.bias.shape))
        return found

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad.mm(self.weight)


class _GroupNormalized(torch.autograd.Function):
    """`sync_batch_norm`'s normalization of a group of shards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, statistics: Any, layer: "GroupedBatchNorm", group: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.statistics, ctx.layer, ctx.group = statistics, layer, group
        return normalized(x, weight, layer.bias, statistics.mean, statistics.variance, layer.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer, group, weight = ctx.layer, ctx.group, ctx.layer.weight
        parts = zip(group.split(grad), group.split(x), strict=True)
        sums = [grad_sums(of_grad, of_x, weight, ctx.statistics, layer.eps) for of_grad, of_x in parts]
        rows = [torch.cat(of_shard) for of_shard in sums]
        group.flush()
        grad_x = input_gradient(grad, x, weight, ctx.statistics, rows, layer) if ctx.needs_input_grad[0] else None
        for parameter, *gradients in zip((weight, layer.bias), *sums, strict=True):
            if parameter.requires_grad:
                group.hand_over(parameter, gradients)
        return grad_x, None, None, None, None


class GroupedBatchNorm(SyncBatchNorm):
    """`SyncBatchNorm` of a shard or of a group of shards."""

    def forward(self, x: Tensor) -> Tensor:
        group = current_group()
        if group is None or not self.training:
            return super().forward(x)
        rows = [statistics_row(part, self.weight.dtype) for part in group.split(x.detach())]
        statistics = self.all_gather_rows(rows, self._combine_and_track)
        result: Tensor = _GroupNormalized.apply(x, self.weight, statistics, self, group)
        return result


def make_groupable(model: nn.Module) -> bool:
    """Make convolutions, linear layers and batch norms accept groups of shards, in place; the latter are synchronized already.

    Return whether these layers have all trainable parameters of the model.
    """
    found: set[int] = set()
    for layer in model.modules():
        grouped = _grouped_class(layer)
        if grouped:
            layer.__class__ = grouped
            found |= set(map(id, layer.parameters(recurse=False)))
    return all(id(p) in found for p in model.parameters() if p.requires_grad)


def _grouped_class(layer: nn.Module) -> type[nn.Module] | None:
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return GroupedConv2d
    if type(layer) is nn.Linear:
        return GroupedLinear
    if type(layer) is SyncBatchNorm and layer.affine and layer.track_running_stats:
        return GroupedBatchNorm
    return None
