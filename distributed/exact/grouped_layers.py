"""Layers whose input may be a group of shards: everything that sums over samples is computed shard by shard.

These sums are the gradients of weights and batch norm's statistics. All else is computed for the group at once. Layers keep
their types, because networks may ask for them and only some ranks have groups; only their `forward` is replaced.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from distributed.exact.shard_group import ShardGroup, current_group
from distributed.models.sync_batch_norm import SyncBatchNorm, grad_sums, input_gradient, normalized, statistics_row

_convolution_backward = torch.ops.aten.convolution_backward.default


class _PerShardGradients(torch.autograd.Function):
    """A layer whose weight gradients go to the group's sink, shard by shard, instead of through the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trainable: Tensor, grouped: "_Grouped", group: ShardGroup) -> Tensor:
        # Without a tensor that requires a gradient there would be no node: x may be images, and the weight frozen.
        ctx.save_for_backward(x)
        ctx.grouped, ctx.group = grouped, group
        return grouped.plain(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grouped, group = ctx.grouped, ctx.group
        parts = zip(group.split(x), group.split(grad), strict=True)
        of_shards = [grouped.parameter_gradients(x_part, grad_part) for x_part, grad_part in parts]
        for parameter, *gradients in zip(_trainable(grouped.layer), *of_shards, strict=True):
            group.hand_over(parameter, gradients)
        return grouped.input_gradient(x, grad) if ctx.needs_input_grad[0] else None, None, None, None


def _trainable(layer: Any) -> list[Tensor]:
    """Return the trainable parameters, in the order of the gradients from `parameter_gradients`."""
    return [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]


class _Grouped:
    """The `forward` of a layer that may get a shard or a group of shards."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)  # a cycle would keep the model's memory until the next collection

    @property
    def layer(self) -> Any:
        """The layer itself."""
        return self._layer()

    def plain(self, x: Tensor) -> Tensor:
        """Return what the layer computes of a single shard."""
        result: Tensor = type(self.layer).forward(self.layer, x)
        return result

    def __call__(self, input: Tensor) -> Tensor:
        group, weight = current_group(), self.layer.weight
        if group is None:
            return self.plain(input)
        # The cast that autocast would insert, here as a node of its own.
        x, trainable = input.to(weight.dtype), next(iter(_trainable(self.layer)), weight)
        result: Tensor = _PerShardGradients.apply(x, trainable, self, group)
        return result

    def parameter_gradients(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        """Return the gradients of the trainable parameters, given one shard's input and the gradient of its output."""
        raise NotImplementedError

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of a group's input."""
        raise NotImplementedError


class _GroupedConv2d(_Grouped):
    """`forward` of `nn.Conv2d`."""

    def parameter_gradients(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        wanted = [p is not None and p.requires_grad for p in (self.layer.weight, self.layer.bias)]
        gradients = self._backward(x, grad, [False, *wanted])[1:]
        return [gradient for gradient, is_wanted in zip(gradients, wanted, strict=True) if is_wanted]

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        gradient: Tensor = self._backward(x, grad, [True, False, False])[0]
        return gradient

    def _backward(self, x: Tensor, grad: Tensor, wanted: list[bool]) -> tuple[Any, ...]:
        layer = self.layer
        bias_sizes = None if layer.bias is None else layer.bias.shape
        return _convolution_backward(  # type: ignore[no-any-return]
            grad,
            x,
            layer.weight,
            bias_sizes,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            layer.groups,
            wanted,
        )


class _GroupedLinear(_Grouped):
    """`forward` of `nn.Linear`, for rows [n, in_features]."""

    def parameter_gradients(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        found, bias = [], self.layer.bias
        if self.layer.weight.requires_grad:
            found.append(grad.t().mm(x))
        if bias is not None and bias.requires_grad:
            found.append(grad.sum_to_size(bias.shape))
        return found

    def input_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad.mm(self.layer.weight)


class _GroupNormalized(torch.autograd.Function):
    """`sync_batch_norm`'s normalization of a group of shards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, statistics: Any, layer: SyncBatchNorm, group: ShardGroup
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.statistics, ctx.layer, ctx.group = statistics, layer, group
        return normalized(x, weight, bias, statistics.mean, statistics.variance, layer.eps)

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
        return grad_x, None, None, None, None, None


class _GroupedBatchNorm(_Grouped):
    """`forward` of `SyncBatchNorm`."""

    def __call__(self, input: Tensor) -> Tensor:
        group, layer = current_group(), self.layer
        if group is None or not layer.training:
            return self.plain(input)
        rows = [statistics_row(part, layer.weight.dtype) for part in group.split(input.detach())]
        statistics = layer.all_gather_rows(rows, layer.combine_statistics)
        result: Tensor = _GroupNormalized.apply(input, layer.weight, layer.bias, statistics, layer, group)
        return result


def make_groupable(model: nn.Module) -> bool:
    """Make convolutions, linear layers and batch norms accept groups of shards, in place; the latter are synchronized already.

    Return whether these layers have all trainable parameters and batch norms of the model; if not, leave it unchanged.
    """
    layers = {layer: grouped for layer in model.modules() if (grouped := _grouped_forward(layer))}
    covered = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    if any(id(parameter) not in covered for parameter in model.parameters() if parameter.requires_grad):
        return False
    if any(isinstance(layer, SyncBatchNorm) and layer not in layers for layer in model.modules()):
        return False  # e.g. one without weights: it would synchronize a group as a single shard
    for layer, grouped in layers.items():
        layer.forward = grouped(layer)
    return True


def _grouped_forward(layer: nn.Module) -> type[_Grouped] | None:
    if "forward" in vars(layer):  # its author's
        return None
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return _GroupedConv2d
    if type(layer) is nn.Linear:
        return _GroupedLinear
    if isinstance(layer, SyncBatchNorm) and layer.affine and layer.track_running_stats:
        return _GroupedBatchNorm
    return None
