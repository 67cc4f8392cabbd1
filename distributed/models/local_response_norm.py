"""Local response normalization across channels (Krizhevsky et al. 2012, section 3.3), several times faster than torch's.

    y_c = x_c / d_c^beta,  d_c = k + alpha / size * sum of x_j^2 over the `size` channels j around c

The sums over channels are one matrix product with a band of ones: in channels_last memory the channels of a pixel lie side
by side, so that images are a matrix [pixels, channels]. torch's own pads, goes to five dimensions and pools.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Pixels at a time on a CPU: what is made of them on the way stays in the cache.
_BLOCK = 2048


class LocalResponseNorm(nn.Module):
    """`nn.LocalResponseNorm` with the same arguments, values and gradients, for images [n, channels, h, w].

    The arithmetic is in float32 at least; the result has the type of the input.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return x  # an empty shard
        # Outside of the Function, so that its own memory layouts are all plain.
        rows = x.permute(0, 2, 3, 1)
        flat = rows.reshape(-1, x.shape[1])
        result: Tensor = _NormalizedRows.apply(flat, self.size, self.alpha, self.beta, self.k)
        return result.view(rows.shape).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class _NormalizedRows(torch.autograd.Function):
    """Of rows [pixels, channels]. Only they are kept for the way back: the denominators cost less than their memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = size, alpha, beta, k
        band = _band(x, size)

        def normalized(rows: Tensor) -> Tensor:
            wide = rows.to(band.dtype)
            return _power(_denominators(wide, band, alpha / size, k), beta) * wide

        with torch.autocast(x.device.type, enabled=False):
            return _in_blocks(normalized, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.options
        band = _band(x, size)

        def gradient(rows: Tensor, grad_rows: Tensor) -> Tensor:
            wide, above = rows.to(band.dtype), grad_rows.to(band.dtype)
            d = _denominators(wide, band, alpha / size, k)
            power = _power(d, beta)
            # What x_c does to d_j is summed over the channels j around which c lies: the band's transpose.
            spread = torch.mm((above * wide).mul_(power).div_(d), band.t())
            return spread.mul_(wide).mul_(-2 * alpha * beta / size).addcmul_(above, power)

        with torch.autocast(x.device.type, enabled=False):
            return _in_blocks(gradient, x, grad.contiguous()), None, None, None, None


def _in_blocks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The function of the rows, in their type; on a CPU of so many at a time that they stay in the cache."""
    if rows[0].device.type != "cpu" or torch.compiler.is_compiling():
        result = function(*rows)
        # torch 2.11 compiles a Function whose forward ends in a cast to the type it has already to gradients of zero.
        return result if result.dtype == rows[0].dtype else result.to(rows[0].dtype)
    result = torch.empty_like(rows[0])
    for out, *blocks in zip(*[torch.split(whole, _BLOCK) for whole in (result, *rows)], strict=True):
        out.copy_(function(*blocks))
    return result


def _band(x: Tensor, size: int) -> Tensor:
    """[channels, channels]: column c is 1 at the channels around c. For even sizes torch takes one more before than after."""
    index = torch.arange(x.shape[1], device=x.device)
    offset = index[:, None] - index[None, :]
    return ((offset >= -(size // 2)) & (offset < size - size // 2)).to(torch.promote_types(x.dtype, torch.float32))


def _denominators(wide: Tensor, band: Tensor, scale: float, k: float) -> Tensor:
    return torch.addmm(wide.new_full((1,), k), wide.square(), band, alpha=scale)


def _power(d: Tensor, beta: float) -> Tensor:
    """d^-beta; for the usual .75 by two roots, which vectorize where a power does not."""
    if beta != 0.75:
        return d.pow(-beta)
    root = d.rsqrt()
    return root.mul_(root.sqrt())
