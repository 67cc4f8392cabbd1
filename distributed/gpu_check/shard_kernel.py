"""A Triton kernel for the weight gradients of a linear layer, with the shard as a grid dimension. Imported on CUDA only.

A program's result depends only on its shard's rows and its tile of the weight: it reads the rows in blocks that start at the
shard's first row, and no sum is split over programs. So a shard's sum has the same bits for any number of shards in the
launch.
"""

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

_TILE, _ROWS = 64, 32


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(grad, x, ends, out, M: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[shard] = grad[rows].T @ x[rows] in float32; grad [n, M], x [n, K], out [shards, M, K]; rows from `ends`."""
    tile, shard = tl.program_id(0), tl.program_id(1)
    m = (tile // tl.cdiv(K, TILE)) * TILE + tl.arange(0, TILE)
    k = (tile % tl.cdiv(K, TILE)) * TILE + tl.arange(0, TILE)
    first, last = tl.load(ends + shard), tl.load(ends + shard + 1)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = rows < last
        a = tl.load(grad + rows[None, :] * M + m[:, None], mask=valid[None, :] & (m < M)[:, None], other=0.0)
        b = tl.load(x + rows[:, None] * K + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    offsets = shard * M * K + m[:, None] * K + k[None, :]
    tl.store(out + offsets, total, mask=(m < M)[:, None] & (k < K)[None, :])


def shard_ends(sizes: list[int], device: torch.device) -> Tensor:
    """Return the first row of each shard, then the end of the last: int32 [shards + 1]."""
    ends = [sum(sizes[:shard]) for shard in range(len(sizes) + 1)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def weight_gradients(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return each shard's weight gradient, float32 [shards, m, k], from contiguous grad [n, m] and x [n, k], in one launch."""
    m, k = grad.shape[1], x.shape[1]
    out = torch.empty(len(ends) - 1, m, k, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(m, _TILE) * triton.cdiv(k, _TILE)
    _kernel[tiles, len(out)](grad, x, ends, out, m, k, TILE=_TILE, ROWS=_ROWS, num_warps=4)
    return out
