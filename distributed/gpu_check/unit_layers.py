"""Checks layers for the step `units`: dropout, response norm, batch norm over shards, empty batches."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed import rng
from distributed.exact.autograd_pass import backward
from distributed.exact.shard_executor import ShardExecutor
from distributed.gpu_check.checks import Checks
from distributed.gpu_check.differences import differing, error, same_bits
from distributed.models import alexnet
from distributed.models.convert_dropout import convert_dropout
from distributed.models.keyed_dropout import KeyedDropout, use_sample_keys
from distributed.models.local_response_norm import LocalResponseNorm
from distributed.models.sync_batch_norm import SyncBatchNorm, convert_batch_norm, one_shard_per_rank

_FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
_SHARDS = (5, 1, 0, 10)


def run(checks: Checks) -> None:
    """Compare the layers on the device with float64 on the CPU."""
    _dropout(checks)
    _empty_batches(checks)
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        for layout in _FORMATS:
            _response_norm(checks, dtype, layout, bound)
            _batch_norm(checks, dtype, layout, bound)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dropout(checks: Checks) -> None:
    with checks.check("dropout equals the CPU's"):
        x, grad = _random(2, 33, 513, seed=1).float()
        keys = rng.sample_keys(torch.arange(33), seed=1, epoch=2)
        for p in (0.5, 0.1):
            outcomes: list[tuple[Tensor, Tensor]] = []
            for device in (checks.device, torch.device("cpu")):
                layer = KeyedDropout(p, name="dropout1")
                leaf = x.to(device).detach().requires_grad_()
                with use_sample_keys(keys.to(device)):
                    y = layer(layer(leaf))
                (gradient,) = torch.autograd.grad(y, leaf, grad.to(device))
                outcomes.append((y, gradient))
            assert all(map(same_bits, *outcomes)), f"p = {p}"


def _empty_batches(checks: Checks) -> None:
    def other_rank(row: Tensor) -> Tensor:
        return torch.stack([row, torch.ones_like(row)])

    for name in ("alexnet", "improved_alexnet", "cifar_alexnet", "cifar_alexnet_bn"):
        if checks.tiny and name == "alexnet":
            continue  # 58 million weights
        for precision in (torch.float32, torch.bfloat16):
            with checks.check(f"an empty batch through {name} in {_name(precision)}"):
                model: nn.Module = convert_dropout(getattr(alexnet, name)(10, 0.5)).to(checks.device)
                convert_batch_norm(model, partial(SyncBatchNorm.of, all_gather_rows=one_shard_per_rank(other_rank)))
                model.to(memory_format=torch.channels_last)
                images = torch.empty(0, 3, 32, 32, device=checks.device).contiguous(memory_format=torch.channels_last)
                keys = torch.empty(0, 2, dtype=torch.int64, device=checks.device)
                labels = torch.empty(0, dtype=torch.int64, device=checks.device)
                autocast = torch.autocast(checks.device.type, precision, enabled=precision == torch.bfloat16)
                with autocast, use_sample_keys(keys):
                    logits = model(images).float()
                    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
                losses.sum().backward()  # type: ignore[no-untyped-call]
                assert logits.shape == (0, 10)
                for path, parameter in model.named_parameters():
                    assert parameter.grad is not None, path
                    assert not parameter.grad.any(), path


def _forward_backward(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layer's result and the gradient of x."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward(grad)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def _response_norm(checks: Checks, dtype: torch.dtype, layout: str, bound: float) -> None:
    with checks.check(f"response norm in {_name(dtype)} {layout}") as figures:
        x, grad = (_random(2, 6, 96, 9, 11, seed=2) * torch.tensor([20.0, 1.0]).view(2, 1, 1, 1, 1)).to(dtype)
        for size, beta in ((5, 0.75), (4, 0.5)):
            options = {"alpha": 1e-2, "beta": beta, "k": 2.0}
            inputs = [t.to(checks.device, memory_format=_FORMATS[layout]) for t in (x, grad)]
            found = _forward_backward(LocalResponseNorm(size, **options), *inputs)
            expected = _forward_backward(nn.LocalResponseNorm(size, **options), x.double(), grad.double())
            assert found[0].dtype == found[1].dtype == dtype
            figures[f"size {size}: y"], figures[f"size {size}: gradient"] = map(error, found, expected)
        assert max(figures.values()) < bound, f"bound {bound}"


def _layer(dtype: torch.dtype, channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, dtype=dtype)
    weight, bias, mean = _random(3, channels, seed=4).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    assert layer.running_mean is not None
    layer.running_mean.copy_(mean)
    return layer


def _state(layer: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return gradients | {name: b for name, b in layer.named_buffers() if b.is_floating_point()}


def _by_shards(layer: nn.BatchNorm2d, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Run exact mode's batch norm over shards of this batch, with the layer's own weights, gradients and statistics."""
    executor = ShardExecutor(len(_SHARDS), workers=1, gather=torch.stack, device=x.device)
    norm = SyncBatchNorm.of(layer, executor.all_gather_rows)
    xs, grads = (torch.split(tensor, list(_SHARDS)) for tensor in (x, grad))
    found: dict[tuple[Tensor, int], Tensor] = {}

    def compute(shard: int) -> tuple[Tensor, Tensor]:
        leaf = xs[shard].clone(memory_format=torch.preserve_format).requires_grad_()
        y = norm(leaf)
        backward((y * grads[shard]).sum(), lambda tensor, gradient: found.__setitem__((tensor, shard), gradient), {})
        return y.detach(), found.pop((leaf, shard))

    y, grad_x = zip(*executor.run(compute), strict=True)
    for parameter in (layer.weight, layer.bias):
        parameter.grad = torch.stack([found[parameter, shard] for shard in range(len(_SHARDS))]).sum(0)
    return torch.cat(y), torch.cat(grad_x)


def _batch_norm(checks: Checks, dtype: torch.dtype, layout: str, bound: float) -> None:
    channels = 32
    weight_dtype = dtype if dtype == torch.float64 else torch.float32  # statistics have it too
    x, grad = _random(2, sum(_SHARDS), channels, 7, 5, seed=3)
    x, grad = (x * 3 + 2).to(dtype), grad.to(dtype)
    reference = _layer(weight_dtype, channels).double()
    passed = _forward_backward(reference, x.double(), grad.double())
    expected = dict(zip(("y", "gradient"), passed, strict=True)) | _state(reference)
    inputs = [t.to(checks.device, memory_format=_FORMATS[layout]) for t in (x, grad)]

    def compare(figures: dict[str, Any], layer: nn.Module, found: tuple[Tensor, Tensor]) -> None:
        outcome = dict(zip(("y", "gradient"), found, strict=True)) | _state(layer)
        figures |= {name: error(outcome[name], expected[name]) for name in expected}
        assert outcome["y"].dtype == outcome["gradient"].dtype == dtype
        # Statistics are never rounded to bfloat16, and weight gradients only by CUDA's NCHW kernel.
        rounded = {"y", "gradient"}
        if checks.is_cuda and layout == "NCHW":
            rounded |= {"weight.grad", "bias.grad"}
        for name, found_error in figures.items():
            limit = bound if name in rounded else min(bound, 2e-5)
            assert found_error < limit, f"{name}: bound {limit}"

    with checks.check(f"batch norm, one process, in {_name(dtype)} {layout}") as figures:
        layer = SyncBatchNorm.of(
            _layer(weight_dtype, channels).to(checks.device), one_shard_per_rank(lambda row: row[None])
        )
        compare(figures, layer, _forward_backward(layer, *inputs))
    with checks.check(f"batch norm, shards of {_SHARDS}, in {_name(dtype)} {layout}") as figures:
        sharded, again = (_layer(weight_dtype, channels).to(checks.device) for _ in range(2))
        found = _by_shards(sharded, *inputs)
        compare(figures, sharded, found)
        assert all(map(same_bits, _by_shards(again, *inputs), found)), "not repeatable"
        assert not differing(_state(again), _state(sharded)), "not repeatable"
