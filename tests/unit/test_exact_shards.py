"""Shards that synchronize at batch norm: in float64 they equal a plain forward and backward pass over the full batch."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distributed.exact.autograd_pass import backward
from distributed.exact.shard_executor import ShardExecutor
from distributed.models.sync_batch_norm import SyncBatchNorm, convert_batch_norm, one_shard_per_rank

CPU = torch.device("cpu")
STEPS = 3
SIZES = [(9,), (5, 4), (3, 3, 3), (7, 0, 1, 1), (0, 0, 9, 0), (0, 1, 2, 0, 3, 0, 2, 1), (2,) * 8]
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]


class Net(nn.Module):
    """Two batch norms, the second in a residual block, with parameters before, between and after them."""

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
class Results:
    """Outputs and gradients of the last of a few training steps with different images, and the buffers after it."""

    outputs: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


def batches(count: int, *, channels_last: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = []
    for _ in range(STEPS):
        images = torch.randn(count, 3, 6, 5, generator=generator, dtype=torch.float64) * 3 + 4
        found.append((images.contiguous(memory_format=layout), torch.randn(count, 5, generator=generator).double()))
    return found


def on_full_batch(model: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> Results:
    for images, targets in steps:
        model.zero_grad()
        outputs = model(images)
        loss_of(outputs, targets).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Results(outputs.detach(), gradients, dict(model.named_buffers()))


def in_exact_mode(
    model: nn.Module, steps: list[tuple[Tensor, Tensor]], sizes: tuple[int, ...], workers: int = 2
) -> Results:
    """Run shards of these sizes as in exact mode: through one model, on worker threads."""
    executor = ShardExecutor(len(sizes), workers=workers, gather=torch.stack, device=CPU)
    convert_batch_norm(model, partial(SyncBatchNorm.of, all_gather_rows=executor.all_gather_rows))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for images, targets in steps:
        shards = list(zip(images.split(sizes), targets.split(sizes), strict=True))
        gradients: list[dict[str, Tensor]] = [{} for _ in sizes]

        def compute(
            shard: int,
            shards: list[tuple[Tensor, Tensor]] = shards,
            gradients: list[dict[str, Tensor]] = gradients,
        ) -> Tensor:
            outputs = model(shards[shard][0])
            found = gradients[shard]
            backward(loss_of(outputs, shards[shard][1]), lambda p, g: found.__setitem__(names[p], g), {})
            return outputs.detach()

        outputs = torch.cat(executor.run(compute))
    totals = {name: sum(shard[name] for shard in gradients) for name in gradients[0]}
    return Results(outputs, totals, dict(model.named_buffers()))


def in_fast_mode(model: nn.Module, steps: list[tuple[Tensor, Tensor]], sizes: tuple[int, ...]) -> Results:
    """Run shards of these sizes as in fast mode; threads with their own models stand in for ranks."""
    barrier, rows = threading.Barrier(len(sizes), timeout=20), [torch.empty(0)] * len(sizes)

    def gather(shard: int, row: Tensor) -> Tensor:
        rows[shard] = row
        barrier.wait()
        gathered = torch.stack(rows)
        barrier.wait()
        return gathered

    models = [copy.deepcopy(model) for _ in sizes]
    for shard, own in enumerate(models):
        all_gather_rows = one_shard_per_rank(partial(gather, shard))
        convert_batch_norm(own, partial(SyncBatchNorm.of, all_gather_rows=all_gather_rows))

    def compute(shard: int) -> Tensor:
        own_steps = [(x.split(sizes)[shard], y.split(sizes)[shard]) for x, y in steps]
        return on_full_batch(models[shard], own_steps).outputs

    with ThreadPoolExecutor(len(sizes)) as pool:
        outputs = torch.cat(list(pool.map(compute, range(len(sizes)))))
    of_shards = [dict(m.named_parameters()) for m in models]
    trainable = [name for name, parameter in of_shards[0].items() if parameter.requires_grad]
    totals = {name: sum(shard[name].grad for shard in of_shards) for name in trainable}
    return Results(outputs, totals, dict(models[0].named_buffers()))


def assert_close(found: Results, expected: Results) -> None:
    pairs = {"outputs": (found.outputs, expected.outputs)}
    for kind in ("gradients", "buffers"):
        here, there = getattr(found, kind), getattr(expected, kind)
        assert here.keys() == there.keys()
        pairs |= {f"{kind}: {name}": (here[name], there[name]) for name in there}
    # A bias before a batch norm has no effect, so its gradient is rounding error only.
    scale = max(gradient.abs().max().item() for gradient in expected.gradients.values())
    for name, (here, there) in pairs.items():
        assert here.shape == there.shape, name
        assert (here - there).abs().max() <= 1e-12 * max(1.0, scale), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_shards_of_any_size_match_the_full_batch(sizes: tuple[int, ...], channels_last: bool) -> None:
    steps = batches(sum(sizes), channels_last=channels_last)
    expected = on_full_batch(net(), steps)
    assert_close(in_exact_mode(net(), steps, sizes), expected)
    assert expected.buffers["norm1.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact_and_fast_mode_agree(sizes: tuple[int, ...]) -> None:
    steps = batches(sum(sizes))
    assert_close(in_exact_mode(net(), steps, sizes), in_fast_mode(net(), steps, sizes))


def test_unsynchronized_shards_give_different_results() -> None:
    """Negative control: each shard's own statistics are not those of the batch."""
    steps = batches(9)
    separate = [
        on_full_batch(net(), [(x.split((5, 4))[shard], y.split((5, 4))[shard]) for x, y in steps]) for shard in range(2)
    ]
    wrong = Results(
        torch.cat([shard.outputs for shard in separate]),
        {name: separate[0].gradients[name] + separate[1].gradients[name] for name in separate[0].gradients},
        separate[0].buffers,
    )
    with pytest.raises(AssertionError):
        assert_close(wrong, on_full_batch(net(), steps))


@pytest.mark.parametrize("momentum", [0.5, None])
def test_running_statistics_follow_the_momentum(momentum: float | None) -> None:
    steps = batches(9)
    assert_close(in_exact_mode(net(momentum), steps, (4, 0, 5)), on_full_batch(net(momentum), steps))


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_is_bit_identical(workers: int) -> None:
    steps, sizes = batches(9), (3, 1, 0, 5)
    one, other = (in_exact_mode(net(), steps, sizes, workers=count) for count in (1, workers))
    assert torch.equal(one.outputs, other.outputs)
    for kind in ("gradients", "buffers"):
        assert all(torch.equal(getattr(other, kind)[name], tensor) for name, tensor in getattr(one, kind).items())


@pytest.mark.parametrize("frozen", ["norm1.weight", "norm2.bias", "first.weight", "first", "norm", "second"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    """If no parameter before a layer is trainable, its input needs no gradient either."""
    models = [net(), net()]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
    steps = batches(9)
    found, expected = in_exact_mode(models[0], steps, (4, 0, 5)), on_full_batch(models[1], steps)
    assert_close(found, expected)
    assert not any(name.startswith(frozen) for name in found.gradients)


class Torchvisions(Net):
    """Residual blocks like those of torchvision's ResNet: the skip connection starts after a ReLU."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm1(self.first(images)).relu()
        x = (x + self.norm2(self.second(x))).relu()
        return self.out(x.mean((2, 3)))


class PreActivation(Net):
    """He et al. 2016, Identity Mappings in Deep Residual Networks: the skip connection starts before any batch norm."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x = x + self.norm2(self.second(self.norm1(x).relu()))
        return self.out(x.relu().mean((2, 3)))


class Dense(Net):
    """Every layer sees all earlier results; batch norms and convolutions are used twice."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        y = self.second(self.norm1(x).relu())
        z = self.second(self.norm2(self.norm1(x + y)).relu())
        return self.out((x + y + z + self.norm2(z)).mean((2, 3)))


class InPlace(Net):
    """In-place operations on the results of batch norm."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm1(self.first(images)).relu_()
        x = self.norm2(self.second(x)).mul_(2).add_(x).relu_()
        return self.out(x.mean((2, 3)))


class Unused(Net):
    """A batch norm and a convolution whose results are dropped."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm1(self.first(images))
        self.norm2(self.second(x))
        return self.out(x.relu().mean((2, 3)))


@pytest.mark.parametrize("model", [Torchvisions, PreActivation, Dense, InPlace, Unused])
@pytest.mark.parametrize("sizes", [(4, 5), (7, 0, 1, 1)], ids=str)
def test_connections_may_bypass_a_batch_norm(model: type[Net], sizes: tuple[int, ...]) -> None:
    steps = batches(9)
    found = in_exact_mode(net(model=model), steps, sizes)
    assert_close(found, on_full_batch(net(model=model), steps))
