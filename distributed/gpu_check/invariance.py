"""Step 7: finds kernels that give a shard's rows the same bits regardless of other rows.

Exact mode relies on one property, which is asserted: the same kernel on the same shapes gives the same bits in any memory.
Checks marked "measured" record, as true or false, further properties that faster ways of computing shards could rely on.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed.gpu_check.checks import Checks
from distributed.gpu_check.differences import error, same_bits
from distributed.training.determinism import make_deterministic


class _Layer(NamedTuple):
    """A convolution (kernel > 0) over images of `side` x `side`, or a linear layer."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    side: int


_LAYERS = (
    _Layer("conv 3x3, 3 to 32", 3, 32, 3, 32),
    _Layer("conv 3x3, 64 to 128", 64, 128, 3, 8),
    _Layer("conv 5x5, 96 to 256", 96, 256, 5, 14),
    _Layer("linear 1024 to 512", 1024, 512, 0, 0),
    _Layer("linear 4096 to 4096", 4096, 4096, 0, 0),
    _Layer("linear 128 to 10", 128, 10, 0, 0),
)
_TINY = (
    _Layer("conv 3x3, 3 to 8", 3, 8, 3, 8),
    _Layer("conv 5x5, 8 to 16", 8, 16, 5, 6),
    _Layer("linear 64 to 32", 64, 32, 0, 0),
)


_TYPES = (torch.bfloat16, torch.float32)


class Passes(NamedTuple):
    """A layer's result, and the gradients of its input (dgrad) and its weight (wgrad)."""

    forward: Tensor
    dgrad: Tensor
    wgrad: Tensor


def run(checks: Checks) -> None:
    """Assert the property that exact mode relies on, and measure further ones."""
    make_deterministic(checks.device, precision="float32")
    layers = _TINY if checks.tiny else _LAYERS
    for layer in layers:
        for dtype in _TYPES:
            _layer(checks, layer, dtype)
    for dtype in _TYPES:  # last: a kernel that cannot read such memory destroys the CUDA context
        if not all(_moved_in_memory(checks, layer, dtype) for layer in layers):
            break


def passes(x: Tensor, weight: Tensor, grad: Tensor) -> Passes:
    """Compute a layer and its gradients without autograd.

    Args:
        x: [n, inputs] of a linear layer, [n, inputs, h, w] of a convolution.
        grad: gradient of the result.
    """
    if x.dim() == 2:
        return Passes(F.linear(x, weight), grad @ weight, grad.t() @ x)
    padding = weight.shape[2] // 2
    geometry = ([1, 1], [padding, padding], [1, 1], False, [0, 0], 1)
    backward = torch.ops.aten.convolution_backward
    dgrad = backward(grad, x, weight, None, *geometry, [True, False, False])[0]
    wgrad = backward(grad, x, weight, None, *geometry, [False, True, False])[1]
    return Passes(F.conv2d(x, weight, padding=padding), dgrad, wgrad)


class _Operands(NamedTuple):
    """A layer's input and weight, and the gradient of its result."""

    x: Tensor
    weight: Tensor
    grad: Tensor


def _operands(layer: _Layer, rows: int, dtype: torch.dtype, device: torch.device) -> _Operands:
    """Return random operands, images and filters in channels_last."""
    generator = torch.Generator().manual_seed(rows)
    image = (layer.side, layer.side) if layer.kernel else ()
    kernel = (layer.kernel, layer.kernel) if layer.kernel else ()
    shapes = ((rows, layer.inputs, *image), (layer.outputs, layer.inputs, *kernel), (rows, layer.outputs, *image))
    x, weight, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    if layer.kernel:
        x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad))
    return _Operands(x, weight, grad)


def _name(layer: _Layer, dtype: torch.dtype) -> str:
    return f"{layer.name} {str(dtype).removeprefix('torch.')}"


def _rows(checks: Checks) -> tuple[int, int]:
    """Return the number of images in a shard and in the entire batch."""
    return (4, 16) if checks.tiny else (16, 128)


def _layer(checks: Checks, layer: _Layer, dtype: torch.dtype) -> None:
    shard, rows = _rows(checks)
    x, weight, grad = _operands(layer, rows, dtype, checks.device)

    def shard_alone(start: int = 0) -> Passes:
        rows_of_shard = slice(start, start + shard)
        return passes(x[rows_of_shard].clone(), weight.clone(), grad[rows_of_shard].clone())

    with checks.check(f"{_name(layer, dtype)}: same bits in other memory") as figures:
        first = shard_alone()
        occupied = []
        for _ in range(3):
            occupied.append(torch.empty(1 << 20, device=checks.device))  # moves the next clones elsewhere
            for kind, again, before in zip(Passes._fields, shard_alone(), first, strict=True):
                assert same_bits(again, before), kind
        expected = passes(x[:shard].double(), weight.double(), grad[:shard].double())
        figures |= {kind: error(a, b) for kind, a, b in zip(Passes._fields, first, expected, strict=True)}
        assert max(figures.values()) < 2e-2
    with checks.check(f"{_name(layer, dtype)}: {shard} rows of {rows} as on their own, measured") as figures:
        batch = passes(x, weight, grad)
        own = slice(rows // 2, rows // 2 + shard)
        alone = shard_alone(own.start)
        figures["forward"] = same_bits(batch.forward[own], alone.forward)
        figures["dgrad"] = same_bits(batch.dgrad[own], alone.dgrad)
        others_zero = torch.zeros_like(grad)
        others_zero[own] = grad[own]
        figures["wgrad, other rows zero"] = same_bits(passes(x, weight, others_zero).wgrad, alone.wgrad)


def _moved_in_memory(checks: Checks, layer: _Layer, dtype: torch.dtype) -> bool:
    """Measure whether the bits depend on the operands' alignment in memory. Return False if that broke the CUDA context."""
    x, weight, grad = _operands(layer, _rows(checks)[0], dtype, checks.device)
    with checks.check(f"{_name(layer, dtype)}: offsets of 1 to 8 elements that change bits, measured") as figures:
        aligned = passes(x, weight, grad)
        figures |= {kind: [] for kind in Passes._fields}
        for offset in range(1, 9):
            try:
                moved = passes(_moved(x, offset), weight, _moved(grad, offset))
                different = [k for k, a, b in zip(Passes._fields, moved, aligned, strict=True) if not same_bits(a, b)]
            except RuntimeError as error:
                figures[f"offset {offset}"] = str(error).splitlines()[0]
                return False
            for kind in different:
                figures[kind].append(offset)
    return True


def _moved(tensor: Tensor, offset: int) -> Tensor:
    """Return a copy in the same memory format whose data starts `offset` elements into its memory."""
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)
