"""Batch norm that cuts the graph, over shards: in float64 what `nn.BatchNorm2d` gives over the whole batch."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distributed.exact.batch_norm import Cut, CuttingBatchNorm, backward
from distributed.exact.replicas import Replicas
from distributed.exact.shard_executor import ShardExecutor
from distributed.models.sync_batch_norm import SyncBatchNorm, by_ranks, convert_batch_norm

CPU = torch.device("cpu")
STEPS = 3
CUTS = [(9,), (5, 4), (3, 3, 3), (7, 0, 1, 1), (0, 0, 9, 0), (0, 1, 2, 0, 3, 0, 2, 1), (2,) * 8]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _kernels_of_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Two batch norms, the second inside a residual block; one parameter before them, some between, some behind."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6, momentum=momentum)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6, momentum=momentum)
        self.out = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm1(self.first(images))
        x = x + self.norm2(self.second(x.relu()))
        return self.out(x.relu().mean((2, 3)))


def net(momentum: float | None = 0.1, model: Callable[..., nn.Module] = Net) -> nn.Module:
    torch.manual_seed(2)
    made = model(momentum=momentum).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn(6))
    return made


@dataclass
class Passed:
    """What a few training steps, each with other images, make of a model: outputs of the last, gradients, buffers."""

    outputs: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def loss_of(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).square().sum()


def batches(count: int, *, channels_last: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = []
    for _ in range(STEPS):
        images = torch.randn(count, 3, 6, 5, generator=generator, dtype=torch.float64) * 3 + 4
        found.append((images.contiguous(memory_format=layout), torch.randn(count, 5, generator=generator).double()))
    return found


def whole(model: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> Passed:
    for images, wanted in steps:
        model.zero_grad()
        outputs = model(images)
        loss_of(outputs, wanted).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Passed(outputs.detach(), gradients, dict(model.named_buffers()))


def cutting(model: nn.Module, steps: list[tuple[Tensor, Tensor]], cut: tuple[int, ...], lanes: int = 2) -> Passed:
    """Shards as exact mode has them: replicas that share weights and buffers, carried by lanes."""
    together = ShardExecutor(len(cut), lanes=lanes, gather=torch.stack, device=CPU)
    replicas, cuts = Replicas(model, len(cut), low=None).models, [list[Cut]() for _ in cut]
    for shard, replica in enumerate(replicas):
        meet = partial(together.meet, shard)
        convert_batch_norm(replica, partial(CuttingBatchNorm.cutting, exchange=meet, cuts=cuts[shard]))
    for images, wanted in steps:
        parts = list(zip(images.split(cut), wanted.split(cut), strict=True))

        def compute(shard: int, parts: list[tuple[Tensor, Tensor]] = parts) -> Tensor:
            replicas[shard].zero_grad()
            outputs = replicas[shard](parts[shard][0])
            backward(loss_of(outputs, parts[shard][1]), cuts[shard])
            return outputs.detach()

        outputs = torch.cat(together.run(compute))
    assert cuts == [[] for _ in cut]
    return Passed(
        outputs, summed([dict(replica.named_parameters()) for replica in replicas]), dict(model.named_buffers())
    )


def by_function(model: nn.Module, steps: list[tuple[Tensor, Tensor]], cut: tuple[int, ...]) -> Passed:
    """Shards as fast mode has them: a thread stands for a rank with a model of its own."""
    barrier, rows = threading.Barrier(len(cut), timeout=20), [torch.empty(0)] * len(cut)

    def gather(shard: int, row: Tensor) -> Tensor:
        rows[shard] = row
        barrier.wait()
        gathered = torch.stack(rows)
        barrier.wait()
        return gathered

    models = [copy.deepcopy(model) for _ in cut]
    for shard, own in enumerate(models):
        convert_batch_norm(own, partial(SyncBatchNorm.of, exchange=by_ranks(partial(gather, shard))))

    def compute(shard: int) -> Tensor:
        return whole(models[shard], [(x.split(cut)[shard], y.split(cut)[shard]) for x, y in steps]).outputs

    with ThreadPoolExecutor(len(cut)) as pool:
        outputs = torch.cat(list(pool.map(compute, range(len(cut)))))
    return Passed(outputs, summed([dict(m.named_parameters()) for m in models]), dict(models[0].named_buffers()))


def summed(of_shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    learning = {name for name, parameter in of_shards[0].items() if parameter.requires_grad}
    return {name: sum(shard[name].grad for shard in of_shards) for name in learning}


def assert_close(found: Passed, expected: Passed) -> None:
    pairs = {"outputs": (found.outputs, expected.outputs)}
    for kind in ("gradients", "buffers"):
        here, there = getattr(found, kind), getattr(expected, kind)
        assert here.keys() == there.keys()
        pairs |= {f"{kind}: {name}": (here[name], there[name]) for name in there}
    # A bias before a batch norm has no influence; its gradient is nothing but rounding.
    scale = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    for name, (here, there) in pairs.items():
        assert here.shape == there.shape, name
        assert (here - there).abs().max() <= 1e-12 * max(1.0, scale), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_shards_of_any_size_give_what_the_whole_batch_gives(cut: tuple[int, ...], channels_last: bool) -> None:
    steps = batches(sum(cut), channels_last=channels_last)
    expected = whole(net(), steps)
    assert_close(cutting(net(), steps, cut), expected)
    assert expected.buffers["norm1.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_cutting_and_the_autograd_function_agree(cut: tuple[int, ...]) -> None:
    steps = batches(sum(cut))
    assert_close(cutting(net(), steps, cut), by_function(net(), steps, cut))


def test_another_batch_gives_something_else() -> None:
    """Were it not so, no test here could fail: statistics of each shard by itself are not those of the batch."""
    steps = batches(9)
    plain = [net() for _ in range(2)]
    apart = [
        whole(model, [(x.split((5, 4))[shard], y.split((5, 4))[shard]) for x, y in steps])
        for shard, model in enumerate(plain)
    ]
    wrong = Passed(
        torch.cat([part.outputs for part in apart]),
        {name: apart[0].gradients[name] + apart[1].gradients[name] for name in apart[0].gradients},
        apart[0].buffers,
    )
    with pytest.raises(AssertionError):
        assert_close(wrong, whole(net(), steps))


@pytest.mark.parametrize("momentum", [0.5, None])
def test_running_statistics_follow_the_momentum(momentum: float | None) -> None:
    steps = batches(9)
    assert_close(cutting(net(momentum), steps, (4, 0, 5)), whole(net(momentum), steps))


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_the_number_of_lanes_does_not_touch_the_bits(lanes: int) -> None:
    steps, cut = batches(9), (3, 1, 0, 5)
    one, other = cutting(net(), steps, cut, lanes=1), cutting(net(), steps, cut, lanes=lanes)
    assert torch.equal(one.outputs, other.outputs)
    for kind in ("gradients", "buffers"):
        assert all(torch.equal(getattr(other, kind)[name], tensor) for name, tensor in getattr(one, kind).items())


@pytest.mark.parametrize("frozen", ["norm1.weight", "norm2.bias", "first.weight", "first", "norm", "second"])
def test_parameters_that_do_not_learn_get_no_gradient_and_the_others_what_they_would(frozen: str) -> None:
    """Where nothing before a layer learns, its input has no gradient either."""
    models = [net(), net()]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    steps = batches(9)
    found, expected = cutting(models[0], steps, (4, 0, 5)), whole(models[1], steps)
    assert_close(found, expected)
    assert not any(name.startswith(frozen) for name in found.gradients)


class Torchvisions(Net):
    """The residual blocks of torchvision's ResNet: what goes around the block has been through a ReLU."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm1(self.first(images)).relu()
        x = (x + self.norm2(self.second(x))).relu()
        return self.out(x.mean((2, 3)))


class PreActivation(Net):
    """He et al. 2016, Identity Mappings in Deep Residual Networks: what goes around the block has met no batch norm."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x = x + self.norm2(self.second(self.norm1(x).relu()))
        return self.out(x.relu().mean((2, 3)))


@pytest.mark.parametrize("model", [Torchvisions, PreActivation])
def test_a_connection_around_a_layer_is_refused(model: type[Net]) -> None:
    with pytest.raises(RuntimeError, match="no connection may go around a batch norm"):
        cutting(net(model=model), batches(9), (4, 5))


def test_evaluation_uses_the_running_statistics_meets_nobody_and_cuts_nothing() -> None:
    def nobody(row: Tensor, combine: object) -> None:
        raise AssertionError("a meeting in evaluation")

    plain, cuts = net(), list[Cut]()
    whole(plain, batches(9))
    model = copy.deepcopy(plain)
    convert_batch_norm(model, partial(CuttingBatchNorm.cutting, exchange=nobody, cuts=cuts))
    images = batches(9)[0][0]
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert model(images[:0]).shape == (0, 5)
    assert cuts == []


def test_statistics_of_bfloat16_images_are_kept_in_float32_and_gradients_come_in_bfloat16() -> None:
    cuts = list[Cut]()
    layer = CuttingBatchNorm.cutting(nn.BatchNorm2d(6), by_ranks(lambda row: row[None]), cuts)
    x = torch.randn(8, 6, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    y.grad = torch.ones_like(y)
    (cut,) = cuts
    cut.backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.bias.grad, torch.full((6,), 200.0))


def test_a_conversion_keeps_names_and_the_very_tensors() -> None:
    model = net()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    convert_batch_norm(model, partial(CuttingBatchNorm.cutting, exchange=by_ranks(lambda row: row[None]), cuts=[]))
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [type(module) for module in model.modules()].count(CuttingBatchNorm) == 2
