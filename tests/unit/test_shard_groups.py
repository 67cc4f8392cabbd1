"""Shards that pass through the model as one batch: the same bits as one by one, or they are not grouped."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from kit.precision import LOW
from torch import Tensor, nn

from distributed.config.engines import Ddp
from distributed.config.functions import Loss
from distributed.config.optim import Sgd
from distributed.data.batch import Batch
from distributed.engine.exact import ExactEngine
from distributed.engine.prepare import Compute
from distributed.exact.shard_gradients import GradientSums
from distributed.models.alexnet import improved_alexnet
from distributed.models.convert_dropout import convert_dropout
from distributed.training.losses import OwnLoss, PerSample, build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

CPU = torch.device("cpu")
SHARDS, STEPS = 8, 4
pytestmark = pytest.mark.usefixtures("restore_threads")


class Residual(nn.Module):
    """A skip connection around a batch norm, a frozen bias, a grouped convolution and a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.inner, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(16)
        self.out = nn.Linear(16, 10, bias=False)
        self.norm.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu_()
        x = (x + self.norm2(self.inner(x))).relu_()
        return self.out(x.mean((2, 3)))


class UsedTwice(Residual):
    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu()
        return self.out(self.norm2(self.inner(self.inner(x))).mean((2, 3)))


class UsedOutside(Residual):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.out.weight.mean()


class NotRounded(Residual):
    """Exp is not on the list of operations that may be grouped."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).exp()


class OtherParameters(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


class Flattening(Residual):
    """The samples are not in dimension 0 of a linear layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Linear(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).permute(0, 2, 3, 1).flatten(0, 2)
        return self.out(self.pixels(x).view(len(images), -1, 16).mean(1))


class WithoutWeights(Residual):
    """With a batch norm that has no weights: it would pass on one row for a group of shards."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(3, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.plain(images))


class NewHead(Residual):
    """With zeros, as in a residual network at its start, and frozen weights before them that need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.weight.requires_grad_(False)
        nn.init.zeros_(self.norm2.weight)
        nn.init.zeros_(self.out.weight)


class Keywords(Residual):
    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(input=self.conv(input=images)).relu()
        return self.out(input=(x + self.norm2(input=self.inner(input=x))).relu().mean((2, 3)))


def alexnet() -> nn.Module:
    return convert_dropout(improved_alexnet(10, 0.5))


def engine_of(model: Callable[[], nn.Module], precision: str, *, workers: int, grouped: bool = True) -> ExactEngine:
    torch.manual_seed(0)
    made = model()
    layers = {name: 1 for name, m in made.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    compute = Compute(precision, channels_last=True, device=CPU, timeout_seconds=10)
    engine = ExactEngine(Ddp(), made, optim=Sgd(), compute=compute, shards=SHARDS, workers=workers, layers=layers)
    engine._groups._possible &= grouped
    return engine


def batch_of(count: int, seed: int, dtype: torch.dtype, side: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, side, side, generator=generator).to(dtype, memory_format=torch.channels_last)
    labels, ids = torch.randint(0, 10, (count,), generator=generator), torch.arange(count)
    bounds = [shard * count // SHARDS for shard in range(SHARDS + 1)]
    sizes = tuple(end - begin for begin, end in pairwise(bounds))
    return Batch(images, labels, ids, torch.stack([ids, ids + seed], 1), count, sizes)


SMOOTHED = build_losses(Loss(label_smoothing=0.1)).training


def trained(
    engine: ExactEngine, count: int, dtype: torch.dtype, loss: PerSample = SMOOTHED, *, side: int = 32, micro: int = 1
) -> dict[str, Tensor]:
    metrics = TotalsAccumulator(CPU)
    for step in range(STEPS):
        train_step(
            engine,
            [batch_of(count, step + 100 * number, dtype, side) for number in range(micro)],
            loss=loss,
            lr=0.05,
            step=step,
            totals=metrics,
        )
    totals = metrics.read()
    return dict(engine.state()) | {"loss": torch.tensor(totals.mean_loss)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("model", "precision"),
    [
        *[(alexnet, precision) for precision in sorted({LOW, "float32", "float64"})],
        *[(Residual, precision) for precision in ("bfloat16", "float32", "float64")],
    ],
)
@pytest.mark.parametrize("count", [64, 52])
def test_groups_have_the_bits_of_their_shards(
    model: Callable[[], nn.Module], precision: str, count: int, workers: int
) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    engine = engine_of(model, precision, workers=workers)
    found = trained(engine, count, dtype)
    assert_same(found, trained(engine_of(model, precision, workers=1, grouped=False), count, dtype))
    assert len(engine._groups._allowed) == 1, "tried once"
    if precision == "bfloat16":
        assert all(engine._groups._allowed.values()), "grouped"


@pytest.mark.parametrize("model", [UsedTwice, UsedOutside, NotRounded, Flattening])
def test_a_trial_finds_what_cannot_be_grouped(model: type[nn.Module]) -> None:
    engine = engine_of(model, "float32", workers=2)
    found = trained(engine, 64, torch.float32)
    assert list(engine._groups._allowed.values()) == [False]
    assert_same(found, trained(engine_of(model, "float32", workers=1, grouped=False), 64, torch.float32))


def test_parameters_outside_known_layers_need_no_trial() -> None:
    engine = engine_of(OtherParameters, "float32", workers=2)
    trained(engine, 64, torch.float32)
    assert engine._groups._allowed == {}


def test_batch_norm_without_weights_is_not_grouped() -> None:
    engine = engine_of(WithoutWeights, "float32", workers=2)
    found = trained(engine, 64, torch.float32)
    assert engine._groups._allowed == {}
    assert_same(found, trained(engine_of(WithoutWeights, "float32", workers=1, grouped=False), 64, torch.float32))


@pytest.mark.parametrize("model", [NewHead, Keywords])
def test_groups_of_unusual_networks(model: type[Residual]) -> None:
    """The first step has two micro-batches, so that the trial meets the initial weights."""
    engine = engine_of(model, "bfloat16", workers=1)
    before = {name: tensor.clone() for name, tensor in engine.state()}
    found = trained(engine, 64, torch.float32, micro=2)
    alone = engine_of(model, "bfloat16", workers=1, grouped=False)
    assert_same(found, trained(alone, 64, torch.float32, micro=2))
    changed = [name for name in before if "conv.bias" in name and not torch.equal(before[name], found[name])]
    assert changed, "the bias of the first layer is trained"


def test_a_trial_varies_weights_that_are_zero() -> None:
    """Negative control: the gradients behind a head of zeros are zero; doubled by grouping, they would still be."""
    engine = engine_of(NewHead, "bfloat16", workers=1)
    original = engine._pass
    head = next(index for parameter, index in engine._index.items() if parameter.shape == (10, 16))

    class Doubling:
        def __init__(self, sums: GradientSums) -> None:
            self.add_gradient, self._sums = sums.add_gradient, sums

        def add_gradients(self, shards: range, gradients: dict[int, list[Tensor]]) -> None:
            factors = {index: 1 if index == head else 2 for index in gradients}
            doubled = {index: [factors[index] * each for each in found] for index, found in gradients.items()}
            self._sums.add_gradients(shards, doubled)

    def doubled(loss, batch, sums, *, grouped):
        return original(loss, batch, Doubling(sums), grouped=grouped)

    engine._pass = doubled
    trained(engine, 64, torch.float32, micro=2)
    assert list(engine._groups._allowed.values()) == [False]


def test_a_constant_loss_of_a_shard_has_gradients_of_zero() -> None:
    def without_class_9(logits: Tensor, targets: Tensor) -> Tensor:
        counted = targets != 9
        if not counted.any():
            return logits.new_zeros(len(logits))
        return nn.functional.cross_entropy(logits, targets, reduction="none") * counted

    loss = OwnLoss(without_class_9)
    found = [trained(engine_of(Residual, "float32", workers=n, grouped=False), 16, torch.float32, loss) for n in (1, 2)]
    assert_same(*found)
    assert all(tensor.isfinite().all() for tensor in found[0].values())


def test_empty_shards() -> None:
    engine = engine_of(Residual, "bfloat16", workers=1)
    found = trained(engine, 5, torch.float32)
    assert_same(found, trained(engine_of(Residual, "bfloat16", workers=2, grouped=False), 5, torch.float32))


def test_different_bits_are_noticed() -> None:
    """Negative control: a trial in which one gradient of a group is off by one bit."""
    engine = engine_of(Residual, "bfloat16", workers=1)
    original = engine._pass

    class OffByOneBit:
        def __init__(self, sums: GradientSums) -> None:
            self.add_gradient, self._sums = sums.add_gradient, sums

        def add_gradients(self, shards: range, gradients: dict[int, list[Tensor]]) -> None:
            gradients = {index: [gradient.clone() for gradient in found] for index, found in gradients.items()}
            if 0 in gradients:
                gradients[0][3].view(-1).view(torch.uint8)[0] ^= 1
            self._sums.add_gradients(shards, gradients)

    def off_by_one_bit(loss, batch, sums, *, grouped):
        return original(loss, batch, OffByOneBit(sums), grouped=grouped)

    engine._pass = off_by_one_bit
    trained(engine, 64, torch.float32)
    assert list(engine._groups._allowed.values()) == [False]


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    distance = logits - (targets[:, None] == torch.arange(10)).to(logits.dtype)
    return (distance * distance).sum(1)


@pytest.mark.parametrize(("function", "grouped"), [(squared, True), (focal, False)])
def test_shards_with_an_own_loss_are_grouped_where_bits_allow(function: PerSample, grouped: bool) -> None:
    loss = OwnLoss(function)
    engine = engine_of(Residual, "bfloat16", workers=1)
    found = trained(engine, 64, torch.float32, loss)
    assert_same(found, trained(engine_of(Residual, "bfloat16", workers=1, grouped=False), 64, torch.float32, loss))
    assert list(engine._groups._allowed.values()) == [grouped]


def test_each_image_size_is_tried() -> None:
    grouped, alone = (engine_of(Residual, "bfloat16", workers=1, grouped=grouped) for grouped in (True, False))
    for tried, side in enumerate((20, 32), start=1):
        found = trained(grouped, 64, torch.float32, side=side)
        assert_same(found, trained(alone, 64, torch.float32, side=side))
        assert len(grouped._groups._allowed) == tried
