"""Synchronized batch norm against torch's layers, with threads standing in for ranks."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.exact.autograd_pass import backward
from distributed.exact.shard_executor import ShardExecutor
from distributed.models.fused_batch_norm import FusedSyncBatchNorm, synchronize_batch_norm
from distributed.models.plain_batch_norm import LocalBatchNorm, make_batch_norm_local, unsupported_batch_norms
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


def layer_of(kind: str, *, bias: bool = True, **options: object) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS[kind][0](CHANNELS, **options).double()
    if not bias:
        layer.bias = None
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
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
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    gradients = {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "grad_x": x.grad} | gradients


def in_shards(layers: list[nn.Module], x: Tensor, grad: Tensor, shards: list[int]) -> dict[str, Tensor]:
    """Return what `passed` returns for the full batch, given one layer a shard; each runs on a thread of its own."""
    arguments = zip(layers, x.split(shards), grad.split(shards), strict=True)
    with ThreadPoolExecutor(len(shards)) as pool:
        results = [work.result() for work in [pool.submit(passed, *each) for each in arguments]]
    return {
        name: torch.cat(values) if name in ("out", "grad_x") else sum(values)
        for name, values in ((name, [result[name] for result in results]) for name in results[0])
    }


def sharded(kind: str, shards: list[int], **options: object) -> list[SyncBatchNorm]:
    threads = Threads(len(shards))
    return [SyncBatchNorm.of(layer_of(kind, **options), threads.of(rank)) for rank in range(len(shards))]


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
@pytest.mark.parametrize("kind", LAYERS)
def test_shards_of_any_size_match_torch_on_the_full_batch(kind, shards):
    check_shards(layer_of(kind), sharded(kind, shards), kind, shards)


def check_shards(plain: nn.Module, layers: list[nn.Module], kind: str, shards: list[int]) -> None:
    """Check two training steps and an evaluation in shards against torch's layer on the full batch."""
    x, grad = batch_of(kind)
    for training in (True, True, False):
        for layer in (plain, *layers):
            layer.train(training)
        expected, found = passed(plain, x, grad), in_shards(layers, x, grad, shards)
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], name)
    for layer in layers:
        assert_same_buffers(layer, plain)


OPTIONS = {
    "no weight and bias": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "large eps": {"eps": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_option_matches_torch(kind, options):
    shards = [4, 0, 5]
    check_shards(layer_of(kind, **OPTIONS[options]), sharded(kind, shards, **OPTIONS[options]), kind, shards)


@pytest.mark.parametrize("names", [["track_running_stats"], ["running_mean", "running_var"], ["num_batches_tracked"]])
def test_statistics_switched_off_later_match_torch(names):
    """Code that exists sets these attributes of a layer after it was made."""

    def switched_off(layer: nn.Module) -> nn.Module:
        for name in names:
            setattr(layer, name, None if name != "track_running_stats" else False)
        return layer

    shards = [4, 5]
    check_shards(switched_off(layer_of("2d")), list(map(switched_off, sharded("2d", shards))), "2d", shards)


def test_evaluation_without_statistics_needs_the_full_batch():
    """Negative control: a shard alone gives another result."""
    plain, alone_too = (layer_of("2d", track_running_stats=False).eval() for _ in range(2))
    x, _ = batch_of("2d")
    assert not torch.allclose(plain(x)[:4], SyncBatchNorm.of(alone_too, alone)(x[:4]))


def test_an_eps_of_0_is_accepted():
    layer = SyncBatchNorm.of(layer_of("2d", eps=0.0, affine=False), alone)
    x, grad = batch_of("2d")
    found = passed(layer, x, grad)
    leaf = x.clone().requires_grad_()
    expected = (leaf - leaf.mean((0, 2, 3), keepdim=True)) / leaf.std((0, 2, 3), correction=0, keepdim=True)
    expected.backward(grad)
    assert_close(found["out"], expected.detach(), "out")
    assert_close(found["grad_x"], leaf.grad, "grad_x")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_used_twice_tracks_each_use_in_order(momentum):
    plain, (sync,) = layer_of("2d", momentum=momentum), sharded("2d", [9], momentum=momentum)
    x, grad = batch_of("2d")

    def used_twice(layer: nn.Module) -> nn.Module:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(self.layer(x).relu() * 2 + x)

        return Twice()

    expected, found = (passed(used_twice(layer), x, grad) for layer in (plain, sync))
    for name in expected:
        assert_close(found[name], expected[name], name)
    assert_same_buffers(sync, plain)
    assert int(sync.num_batches_tracked) == 2


class Gathers:
    """Counts synchronization points of a batch in one shard."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, row: Tensor, reduce_fn):
        self.count += 1
        return alone(row, reduce_fn)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"], ["x"], ["x", "weight"]])
def test_frozen_tensors_get_no_gradient(frozen):
    gathers = Gathers()
    plain, sync = layer_of("2d"), SyncBatchNorm.of(layer_of("2d"), gathers)
    x, grad = batch_of("2d")
    for layer in (plain, sync):
        leaf = x.clone().requires_grad_("x" not in frozen)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        layer(leaf).backward(grad)
        layer.grad_x = leaf.grad
    for name, expected, found in [
        ("x", plain.grad_x, sync.grad_x),
        *[(name, p.grad, dict(sync.named_parameters())[name].grad) for name, p in plain.named_parameters()],
    ]:
        assert (found is None) == (expected is None) == (name in frozen), name
        if expected is not None:
            assert_close(found, expected, name)
    assert gathers.count == (1 if "x" in frozen else 2)


def test_operations_in_place_after_it_are_supported():
    x, grad = batch_of("2d")
    plain, sync = layer_of("2d"), SyncBatchNorm.of(layer_of("2d"), alone)
    expected, found = (
        passed(nn.Sequential(plain, nn.ReLU()), x, grad),
        passed(nn.Sequential(sync, nn.ReLU(True)), x, grad),
    )
    for name in expected:
        assert_close(found[name], expected[name], name)


def test_its_input_must_not_change_before_the_backward_pass():
    sync = SyncBatchNorm.of(layer_of("2d"), alone)
    x, grad = batch_of("2d")
    activation = x.requires_grad_() * 1
    out = sync(activation)
    activation.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


class HalfUsed(torch.autograd.Function):
    """Passes no gradient back to its first input."""

    @staticmethod
    def forward(ctx, unused, used):
        return used.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def test_an_undefined_gradient_counts_as_zero():
    sync = SyncBatchNorm.of(layer_of("2d"), alone)
    x, grad = batch_of("2d")
    leaf = x.clone().requires_grad_()
    HalfUsed.apply(sync(leaf), leaf).backward(grad)
    assert torch.equal(leaf.grad, grad)
    assert not sync.weight.grad.any()


def test_a_second_derivative_is_refused():
    sync = SyncBatchNorm.of(layer_of("2d"), alone)
    x = batch_of("2d")[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative: .* without create_graph=True"):
        torch.autograd.grad(sync(x).square().sum(), x, create_graph=True)


def test_a_gradient_that_is_not_dense_is_supported():
    plain, sync = layer_of("2d"), SyncBatchNorm.of(layer_of("2d"), alone)
    x, _ = batch_of("2d", channels_last=True)
    grad = torch.ones(1, dtype=torch.float64).expand(x.shape)
    expected, found = passed(plain, x, grad), passed(sync, x, grad)
    for name in expected:
        assert_close(found[name], expected[name], name)


class Reads(TorchDispatchMode):
    """Counts numbers read from tensors, for which CUDA would make the host wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS)
def test_no_number_is_read_from_the_device(options):
    (layer,) = sharded("2d", [9], **OPTIONS[options])
    x, grad = batch_of("2d")
    with Reads() as reads:
        layer(x.requires_grad_()).backward(grad)
    assert reads.count == 0
    with reads:
        float(x.detach().sum())
    assert reads.count == 1


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
    x = batch_of("2d")[0].bfloat16().requires_grad_()
    out = sync(x)
    assert out.dtype == torch.bfloat16
    plain(x.float())
    assert sync.running_mean.dtype == torch.float32
    assert torch.allclose(sync.running_mean, plain.running_mean, rtol=1e-5)
    assert torch.allclose(sync.running_var, plain.running_var, rtol=1e-4)
    out.backward(torch.ones_like(out))
    assert (x.grad.dtype, sync.weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_conversion_keeps_names_and_tensors():
    inner = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), inner, nn.BatchNorm2d(CHANNELS))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    convert_batch_norm(model.eval(), partial(SyncBatchNorm.of, all_gather_rows=alone))
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 2
    assert not model[1][0].training


def test_a_synchronized_layer_is_still_what_it_was():
    """Networks ask for the type of a layer, and hold it in lists; their own `train` may freeze it."""
    layer = nn.BatchNorm1d(CHANNELS)
    held = [layer]
    sync = SyncBatchNorm.of(layer, alone)
    assert sync is held[0]
    assert isinstance(sync, nn.BatchNorm1d)
    assert isinstance(sync, SyncBatchNorm)
    assert type(sync) is type(SyncBatchNorm.of(nn.BatchNorm1d(3), alone))
    assert isinstance(FusedSyncBatchNorm.of(nn.BatchNorm2d(3), alone), SyncBatchNorm)


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


def in_exact_mode(layer: nn.Module, x: Tensor, grad: Tensor, shards: list[int], workers: int) -> dict[str, Tensor]:
    """Return the output and all gradients of one step of exact mode: one layer for all shards, in greenlets."""
    executor = ShardExecutor(len(shards), workers=workers, gather=torch.stack, device=torch.device("cpu"))
    sync = SyncBatchNorm.of(layer, executor.all_gather_rows)
    leaves = [part.clone(memory_format=torch.preserve_format).requires_grad_() for part in x.split(shards)]
    found: list[dict[Tensor, Tensor]] = [{} for _ in shards]

    def compute(shard: int) -> Tensor:
        out = sync(leaves[shard])
        backward((out * grad.split(shards)[shard]).sum(), found[shard].__setitem__, {})
        return out.detach()

    outputs = executor.run(compute)
    gradients = {f"grad_{n}": sum(of_shard[p] for of_shard in found) for n, p in sync.named_parameters()}
    grad_x = torch.cat([of_shard[leaf] for of_shard, leaf in zip(found, leaves, strict=True)])
    return {"out": torch.cat(outputs), "grad_x": grad_x} | gradients


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS)
def test_exact_mode_has_every_option(options, training):
    plain, x, grad = layer_of("2d", **OPTIONS[options]).train(training), *batch_of("2d")
    expected = passed(plain, x, grad)
    for workers in (1, 2):
        layer = layer_of("2d", **OPTIONS[options]).train(training)
        found = in_exact_mode(layer, x, grad, [4, 0, 2, 3], workers)
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name], name)
        assert_same_buffers(layer, plain)


def test_statistics_survive_a_batch_that_is_not_finite():
    """Kernels write to vectors that are kept from one batch to the next; nobody may read them."""
    plain, sync = layer_of("2d"), SyncBatchNorm.of(layer_of("2d"), alone)
    x, grad = batch_of("2d")
    expected = passed(plain, x, grad)
    passed(SyncBatchNorm.of(layer_of("2d"), alone), torch.full_like(x, torch.nan), grad)
    for name, tensor in passed(sync, x, grad).items():
        assert_close(tensor, expected[name], name)
    assert_same_buffers(sync, plain)


@pytest.mark.parametrize("value", [0.0, math.inf, 1e308])
@pytest.mark.filterwarnings("error")
def test_extreme_values_are_as_silent_as_in_torch(value):
    plain, sync = layer_of("2d", affine=False), SyncBatchNorm.of(layer_of("2d", affine=False), alone)
    x, grad = batch_of("2d")
    x = torch.full_like(x, value) + x * (value != 0)
    expected, found = passed(plain, x, grad * 1e300), passed(sync, x, grad * 1e300)
    for name in expected:
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


class WithRelu(nn.BatchNorm2d):
    """A batch norm with a forward of its own, like timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NeverTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class RenamedOnly(nn.BatchNorm2d):
    """Computes what torch's layer computes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(CHANNELS)
    layer.forward = torch.relu
    return layer


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def reparametrized() -> nn.Module:
    return torch.nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(CHANNELS), "weight", Doubled())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (WithRelu(CHANNELS), r"\(WithRelu\) is a batch norm with its own forward"),
        (NeverTraining(CHANNELS), "its own train"),
        (patched(), "its own forward"),
        (reparametrized(), "parametrized weights"),
        (nn.LazyBatchNorm2d(), "does not know its number of channels yet"),
        (nn.LazyBatchNorm2d(affine=False, track_running_stats=False), "does not know"),
    ],
)
def test_layers_that_are_more_than_batch_norm_are_named(layer, reason):
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ModuleDict({"norm": layer}), WithRelu(3))
    with pytest.raises(ValueError, match=rf"1\.norm {reason}.*; 2 \(WithRelu\)" if "(" in reason else reason) as caught:
        convert_batch_norm(model, partial(SyncBatchNorm.of, all_gather_rows=alone))
    assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.BatchNorm2d, "a model that is refused stays as it was"
    with pytest.raises(ValueError, match="the model"):
        convert_batch_norm(layer, partial(SyncBatchNorm.of, all_gather_rows=alone))


def materialized() -> nn.Module:
    layer = nn.LazyBatchNorm2d()
    layer(torch.zeros(2, CHANNELS, 1, 1))
    return layer


@pytest.mark.parametrize("layer", [RenamedOnly(CHANNELS), nn.SyncBatchNorm(CHANNELS), materialized()])
def test_every_form_of_torch_layer_is_synchronized(layer):
    model = nn.Sequential(layer)
    assert unsupported_batch_norms(model) == []
    convert_batch_norm(model, partial(SyncBatchNorm.of, all_gather_rows=alone))
    assert isinstance(layer, SyncBatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm), "which DDP rejects on CPUs"
    assert model[0] is layer


@pytest.mark.parametrize("kind", LAYERS)
def test_torch_sync_batch_norm_becomes_local(kind):
    plain, made = layer_of(kind), nn.Sequential(nn.SyncBatchNorm(CHANNELS).double(), WithRelu(CHANNELS))
    made[0].load_state_dict(plain.state_dict())
    make_batch_norm_local(made)
    expected, found = passed(plain, *batch_of(kind)), passed(made[0], *batch_of(kind))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same_buffers(made[0], plain)
    assert [type(layer) for layer in made] == [LocalBatchNorm, WithRelu]
    assert unsupported_batch_norms(made[:1]) == []
    with pytest.raises(ValueError, match="at least 2D"):
        made[0](torch.zeros(CHANNELS))


def test_other_norms_stay():
    model = nn.Sequential(nn.InstanceNorm2d(CHANNELS), nn.GroupNorm(2, CHANNELS), nn.LayerNorm(CHANNELS))
    before = list(map(type, model))
    convert_batch_norm(model, partial(SyncBatchNorm.of, all_gather_rows=alone))
    assert list(map(type, model)) == before


def test_a_model_that_is_a_batch_norm_is_synchronized():
    layer = nn.BatchNorm2d(CHANNELS)
    convert_batch_norm(layer, partial(SyncBatchNorm.of, all_gather_rows=alone))
    assert isinstance(layer, SyncBatchNorm)


def test_hooks_and_attributes_of_a_layer_are_kept():
    layer, seen = nn.BatchNorm2d(CHANNELS), []
    layer.note = "from the user"
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    before = repr(layer)
    sync = SyncBatchNorm.of(layer, alone)
    sync(torch.randn(2, CHANNELS, 1, 1))
    assert (sync.note, seen, repr(sync)) == (
        "from the user",
        ["hook"],
        before.replace("BatchNorm2d", "SyncBatchNorm"),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fast_mode_uses_the_fused_layer_on_cuda_only(device):
    with FakeTensorMode():
        layers = (
            nn.BatchNorm2d(CHANNELS, device=device),
            nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False),
        )
    model = nn.Sequential(*layers)
    synchronize_batch_norm(model, lambda row: row[None])
    assert all(isinstance(layer, SyncBatchNorm) for layer in model)
    assert {isinstance(layer, FusedSyncBatchNorm) for layer in model} == {device == "cuda"}
    assert model[0].running_mean.device.type == device


@pytest.mark.parametrize("options", OPTIONS)
def test_the_fused_layer_leaves_the_rest_to_its_base(options):
    """Its kernels run on CUDA only: a layer that equals torch's on the CPU has not called them."""
    kernels_apply = options in ("momentum 0", "large eps")
    layer = FusedSyncBatchNorm.of(layer_of("2d", **OPTIONS[options]), alone)
    if kernels_apply:
        with pytest.raises(NotImplementedError, match="CUDA"):
            passed(layer, *batch_of("2d"))
    else:
        check_shards(layer_of("2d", **OPTIONS[options]), [layer], "2d", [9])


def test_the_fused_layer_leaves_evaluation_to_its_base():
    plain, fused = layer_of("2d").eval(), FusedSyncBatchNorm.of(layer_of("2d"), alone).eval()
    x, _ = batch_of("2d")
    assert torch.equal(fused(x), plain(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_fused_layer_counts_a_single_value_as_the_others_do() -> None:
    """torch's kernel divides the variance by the number of values minus one."""
    x = torch.randn(1, CHANNELS, 1, 1, dtype=torch.float64)
    sync = SyncBatchNorm.of(layer_of("2d"), alone)
    fused = FusedSyncBatchNorm.of(layer_of("2d"), alone).cuda()
    sync(x)
    fused(x.cuda())
    assert torch.allclose(fused.running_var.cpu(), sync.running_var, rtol=1e-5)


def test_weights_stay_resizable() -> None:
    """Sharded weights free and allocate their memory by resizing it."""
    layers = sharded("2d", [4, 5], affine=True)
    in_shards(list(layers), *batch_of("2d"), [4, 5])
    assert all(p.untyped_storage().resizable() for layer in layers for p in layer.parameters())
