"""Synchronized batch norm against torch's layers, with threads standing in for ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.models.fused_batch_norm import FusedSyncBatchNorm, synchronize_batch_norm
from distributed.models.sync_batch_norm import AllGatherRows, SyncBatchNorm, convert_batch_norm, one_shard_per_rank

LAYERS = {
    "2d": (nn.BatchNorm2d, (5, 4)),
    "1d": (nn.BatchNorm1d, (7,)),
    "flat": (nn.BatchNorm1d, ()),
    "3d": (nn.BatchNorm3d, (2, 3, 2)),
}
CHANNELS = 6

alone: AllGatherRows = one_shard_per_rank(lambda row: row[None])


class Threads:
    """Gathers rows over threads that stand in for ranks."""

    def __init__(self, count: int) -> None:
        self.barrier, self.rows = threading.Barrier(count, timeout=20), [torch.empty(0)] * count

    def of(self, rank: int) -> AllGatherRows:
        def gather(row: Tensor) -> Tensor:
            self.rows[rank] = row
            self.barrier.wait()
            rows = torch.stack(self.rows)
            self.barrier.wait()
            return rows

        return one_shard_per_rank(gather)


def layer_of(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS[kind][0](CHANNELS, **options).double()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(CHANNELS))
    return layer


def batch_of(kind: str, count: int = 9, *, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    shape = (2, count, CHANNELS, *LAYERS[kind][1])
    x, grad = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 50
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x, grad - 50


def passed(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the output and all gradients of one training step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    out.backward(grad)
    return {"out": out.detach(), "grad_x": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.shape == expected.shape, name
    scale = expected.abs().max().clamp(min=1)
    assert (found - expected).abs().max() <= 1e-12 * scale, name


def assert_same_buffers(found: nn.Module, expected: nn.Module) -> None:
    for name, buffer in expected.named_buffers():
        assert_close(dict(found.named_buffers())[name], buffer, name)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_shard_matches_torch(kind):
    plain, sync = layer_of(kind), SyncBatchNorm.of(layer_of(kind), alone)
    for count in (9, 4):
        expected, found = (passed(layer, *batch_of(kind, count)) for layer in (plain, sync))
        for name in expected:
            assert_close(found[name], expected[name], name)
    assert_same_buffers(sync, plain)


def test_one_shard_in_channels_last_matches_torch():
    plain, sync = layer_of("2d"), SyncBatchNorm.of(layer_of("2d"), alone)
    x, grad = batch_of("2d", channels_last=True)
    expected, found = passed(plain, x, grad), passed(sync, x, grad)
    for name in expected:
        assert_close(found[name], expected[name], name)
    assert found["out"].is_contiguous(memory_format=torch.channels_last)
    assert found["grad_x"].is_contiguous(memory_format=torch.channels_last)
    assert_same_buffers(sync, plain)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_statistics_follow_the_momentum(momentum):
    plain = layer_of("2d", momentum=momentum)
    sync = SyncBatchNorm.of(layer_of("2d", momentum=momentum), alone)
    for count in (9, 3, 5):
        for layer in (plain, sync):
            layer(batch_of("2d", count)[0])
    assert_same_buffers(sync, plain)
    assert int(sync.num_batches_tracked) == 3


@pytest.mark.parametrize("shards", [[3, 3, 3], [5, 1, 3], [4, 0, 5], [0, 9, 0]])
@pytest.mark.parametrize("kind", ["2d", "flat"])
def test_shards_of_any_size_match_torch_on_the_full_batch(kind, shards):
    plain = layer_of(kind)
    x, grad = batch_of(kind)
    expected = passed(plain, x, grad)
    threads = Threads(len(shards))
    layers = [SyncBatchNorm.of(layer_of(kind), threads.of(rank)) for rank in range(len(shards))]
    arguments = zip(layers, x.split(shards), grad.split(shards), strict=True)
    with ThreadPoolExecutor(len(shards)) as pool:
        results = [work.result() for work in [pool.submit(passed, *each) for each in arguments]]
    for name in ("out", "grad_x"):
        assert_close(torch.cat([result[name] for result in results]), expected[name], name)
    for name in ("grad_weight", "grad_bias"):
        assert_close(sum(result[name] for result in results), expected[name], name)
    for layer in layers:
        assert_same_buffers(layer, plain)


def test_evaluation_does_not_synchronize():
    def no_gather(row: Tensor) -> Tensor:
        raise AssertionError("evaluation synchronized")

    plain, sync = layer_of("2d").eval(), SyncBatchNorm.of(layer_of("2d"), one_shard_per_rank(no_gather)).eval()
    x, _ = batch_of("2d")
    assert torch.equal(sync(x), plain(x))
    assert sync(x[:0]).shape == (0, CHANNELS, 5, 4)


def test_a_mean_far_from_zero_loses_no_precision():
    plain, sync = layer_of("2d"), SyncBatchNorm.of(layer_of("2d"), alone)
    x, grad = batch_of("2d")
    x = x + 1e6
    expected, found = passed(plain, x, grad), passed(sync, x, grad)
    assert (found["out"] - expected["out"]).abs().max() < 1e-8


def test_bfloat16_images_have_float32_statistics():
    plain, sync = layer_of("2d").float(), SyncBatchNorm.of(layer_of("2d").float(), alone)
    x = batch_of("2d")[0].bfloat16()
    out = sync(x)
    assert out.dtype == torch.bfloat16
    plain(x.float())
    assert sync.running_mean.dtype == torch.float32
    assert torch.allclose(sync.running_mean, plain.running_mean, rtol=1e-5)
    assert torch.allclose(sync.running_var, plain.running_var, rtol=1e-4)


def test_conversion_keeps_names_and_tensors():
    inner = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), inner, nn.BatchNorm2d(CHANNELS))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = convert_batch_norm(model.eval(), partial(SyncBatchNorm.of, all_gather_rows=alone))
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [type(module) for module in converted.modules()].count(SyncBatchNorm) == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert not converted[1][0].training


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_layers_without_weights_or_statistics_are_rejected(options):
    with pytest.raises(ValueError, match="needs affine=True"):
        SyncBatchNorm.of(nn.BatchNorm2d(3, **options), alone)


class Nones(TorchDispatchMode):
    """Counts arguments of the native backward pass that are None although CUDA's kernel requires a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.missing = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.calls += 1
            self.missing += sum(argument is None for argument in args[:7])
        return func(*args, **(kwargs or {}))


def test_backward_passes_a_tensor_for_every_statistic():
    layer = SyncBatchNorm.of(layer_of("2d"), alone)
    x, grad = batch_of("2d")
    with Nones() as nones:
        layer(x.requires_grad_()).backward(grad)
    assert (nones.calls, nones.missing) == (1, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fast_mode_uses_the_fused_layer_on_cuda_only(device):
    with FakeTensorMode():
        layer = nn.BatchNorm2d(CHANNELS, device=device)
    model = synchronize_batch_norm(nn.Sequential(layer), lambda row: row[None])
    assert type(model[0]) is (FusedSyncBatchNorm if device == "cuda" else SyncBatchNorm)
    assert model[0].running_mean.device.type == device
