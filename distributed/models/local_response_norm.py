"""Local response normalization across channels (Krizhevsky et al. 2012, section 3.3), several times faster than torch's.

    y_c = x_c / d_c^beta,  d_c = k + alpha / size * sum of x_j^2 over the `size` channels j around c

In channels_last memory the channels of a pixel are adjacent, so images are a matrix [pixels, channels] and the sums over
channels are one matrix product with a banded matrix of ones. torch's version pads, reshapes to five dimensions and pools.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Pixels per block on a CPU, so that intermediate results fit in the cache.
_BLOCK = 2048


class LocalResponseNorm(nn.Module):
    """Same arguments, values and gradients as `nn.LocalResponseNorm`, for images [n, channels, h, w].

    Computes in float32 or wider; the result has the dtype of the input.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x  # an empty shard; torch.export would fix the batch size for len()
        # Permuted outside the autograd Function, which then sees contiguous tensors only.
        rows = x.permute(0, 2, 3, 1)
        flat = rows.reshape(-1, x.shape[1])
        result: Tensor = _NormalizedRows.apply(flat, self.size, self.alpha, self.beta, self.k)
        return result.view(rows.shape).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class _NormalizedRows(torch.autograd.Function):
    """Normalizes rows [pixels, channels]. Saves only its input: recomputing the denominators is cheaper than storing them."""

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
            wide, upstream = rows.to(band.dtype), grad_rows.to(band.dtype)
            d = _denominators(wide, band, alpha / size, k)
            power = _power(d, beta)
            # x_c contributes to d_j of every channel j whose window contains c: the transposed band.
            through_d = torch.mm((upstream * wide).mul_(power).div_(d), band.t())
            return through_d.mul_(wide).mul_(-2 * alpha * beta / size).addcmul_(upstream, power)

        with torch.autocast(x.device.type, enabled=False):
            return _in_blocks(gradient, x, grad.contiguous()), None, None, None, None


def _in_blocks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Apply a row-wise function, on a CPU block by block so that intermediates fit in the cache. Keeps the rows' dtype."""
    if rows[0].device.type != "cpu" or torch.compiler.is_compiling():
        result = function(*rows)
        # Compiled by torch 2.11, a Function whose forward ends in a no-op cast has gradients of zero.
        return result if result.dtype == rows[0].dtype else result.to(rows[0].dtype)
    result = torch.empty_like(rows[0])
    for out, *blocks in zip(*[torch.split(tensor, _BLOCK) for tensor in (result, *rows)], strict=True):
        out.copy_(function(*blocks))
    return result


def _band(x: Tensor, size: int) -> Tensor:
    """Return [channels, channels]: column c is 1 at the channels in the window of c, else 0.

    For even sizes the window has one more channel before c than after it, like torch's.
    """
    index = torch.arange(x.shape[1], device=x.device)
    offset = index[:, None] - index[None, :]
    return ((offset >= -(size // 2)) & (offset < size - size // 2)).to(torch.promote_types(x.dtype, torch.float32))


def _denominators(wide: Tensor, band: Tensor, scale: float, k: float) -> Tensor:
    return torch.addmm(wide.new_full((1,), k), wide * wide, band, alpha=scale)


def _power(d: Tensor, beta: float) -> Tensor:
    """Return d^-beta; for the usual 0.75 by two square roots, which vectorize, unlike `pow`."""
    if beta != 0.75:
        return d.pow(-beta)
    root = d.rsqrt()
    return root.mul_(root.sqrt())
