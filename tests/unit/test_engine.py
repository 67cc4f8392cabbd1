"""Fast and exact mode in one process: gradients, accumulation, clipping, precision, state."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed.config.engines import Ddp
from distributed.config.functions import Loss
from distributed.config.optim import Sgd
from distributed.data.batch import Batch
from distributed.engine.ddp import DdpEngine
from distributed.engine.deepspeed import DeepSpeedEngine
from distributed.engine.exact import ExactEngine
from distributed.engine.prepare import Compute
from distributed.engine.protocol import Engine, Outcome
from distributed.training.losses import build_losses
from distributed.training.steps import train_step
from distributed.training.totals import TotalsAccumulator

CPU = torch.device("cpu")
SHARDS = 4
PRECISIONS = ["float32", "bfloat16", "float16", "float64"]
pytestmark = pytest.mark.usefixtures("restore_threads")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(images)).relu().mean((2, 3)))


class FiveDimensions(Small):
    """Has a weight and a buffer of five dimensions, as capsule networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.votes = nn.Parameter(torch.ones(1, 2, 1, 1, 4))
        self.register_buffer("grid", torch.ones(1, 1, 2, 2, 2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu().mean((2, 3))
        return self.out(x * self.votes.sum((0, 1, 2, 3)) * self.grid.mean())


def fast(precision: str = "float64", model: Callable[[], nn.Module] = Small, **optim: object) -> DdpEngine:
    torch.manual_seed(0)
    compute = Compute(precision, channels_last=True, device=CPU, timeout_seconds=10)
    return DdpEngine(Ddp(), model(), optim=Sgd(**optim), compute=compute, example=batch_of(2, 2), compile=False)


def exact(
    precision: str = "float64", model: Callable[[], nn.Module] = Small, *, workers: int = 2, **optim: object
) -> ExactEngine:
    torch.manual_seed(0)
    compute = Compute(precision, channels_last=True, device=CPU, timeout_seconds=10)
    return ExactEngine(Ddp(), model(), optim=Sgd(**optim), compute=compute, shards=SHARDS, workers=workers, layers={})


@pytest.fixture(params=[fast, exact], ids=["fast", "exact"])
def engine_of(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    return request.param


def batch_of(count: int, global_count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (count,), generator=generator)
    keys = torch.zeros(count, 2, dtype=torch.int64)
    return in_shards(Batch(images.to(dtype), labels, torch.arange(count), keys, global_count, (count,)))


def in_shards(batch: Batch, start: int = 0, stop: int | None = None) -> Batch:
    """Return images `start` to `stop` in shards of uneven size; some are empty if there are few images."""
    selected = slice(start, stop)
    count = len(batch.labels[selected])
    bounds = [shard * count // SHARDS for shard in range(SHARDS + 1)]
    sizes = tuple(end - begin for begin, end in pairwise(bounds))
    tensors = (batch.images, batch.labels, batch.sample_ids, batch.sample_keys)
    return Batch(*[tensor[selected] for tensor in tensors], batch.global_count, sizes)


def stepped(engine: Engine, batches: list[Batch], lr: float = 0.1) -> Tensor:
    return train_step(engine, batches, loss=build_losses(Loss()).training, lr=lr, step=0, totals=TotalsAccumulator(CPU))


def model_state(engine: Engine) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor.clone() for name, tensor in engine.state() if name.startswith("model.")}


def weights(engine: Engine) -> Tensor:
    state = model_state(engine)
    return torch.cat([state[name].flatten() for name, _ in Small().named_parameters()])


def plain_model(engine: Engine, model: nn.Module | None = None) -> nn.Module:
    """Return a plain model with the engine's weights and buffers."""
    plain = (model or Small()).double()
    plain.load_state_dict(model_state(engine))
    return plain


def gradient_of(model: nn.Module, batch: Batch) -> Tensor:
    F.cross_entropy(model(batch.images), batch.labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("count", [8, 9, 3, 1])
def test_step_follows_the_gradient_of_the_mean_loss(engine_of, count):
    engine = engine_of(momentum=0.0, nesterov=False, weight_decay=0.0)
    batch, model, before = batch_of(count, count), plain_model(engine), weights(engine)
    gradient = gradient_of(model, batch)
    norm = stepped(engine, [batch], lr=0.3)
    assert torch.allclose(weights(engine), before - 0.3 * gradient, rtol=1e-12, atol=1e-15)
    assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-12)
    for name, buffer in model.named_buffers():
        assert torch.allclose(model_state(engine)[name], buffer, rtol=1e-12), name


@dataclass
class Node:
    layer: nn.Module


class Held(Small):
    """Calls its batch norm through another object, and asks for the types of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(self.norm)

    def forward(self, images: Tensor) -> Tensor:
        x = self.node.layer(self.conv(images)).relu()
        known = type(self.conv) is nn.Conv2d and type(self.out) is nn.Linear and isinstance(self.norm, nn.BatchNorm2d)
        return self.out(x.mean((2, 3)) if known else x.amax((2, 3)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("workers", [1, 4])
def test_other_references_to_a_layer_see_the_same_layer(precision, workers):
    """With one worker, shards may be grouped, which other code of the layers computes."""
    batch = batch_of(8, 8, dtype=torch.float32)
    expected, found = exact(precision, Small, workers=workers), exact(precision, Held, workers=workers)
    for engine in (expected, found):
        for _ in range(4):
            stepped(engine, [batch])
    assert torch.equal(weights(found), weights(expected))
    assert all(torch.equal(tensor, model_state(expected)[name]) for name, tensor in model_state(found).items())


class Merging(Small):
    """Merges a product of two matrices into the weight of its last layer in `eval`, like LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(10, 1))

    def train(self, mode: bool = True) -> nn.Module:
        if mode != self.training:
            self.out.weight.data += (self.up @ self.down).detach() * (-1 if mode else 1)
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        logits, lora = super().forward(images), self.up @ self.down
        return logits + self.norm(self.conv(images)).relu().mean((2, 3)) @ lora.t() if self.training else logits


def test_weights_that_eval_merges_are_averaged_first():
    engine = fast(model=Merging, ema_decay=0.5)
    for _ in range(3):
        stepped(engine, [batch_of(8, 8)])
    average = Merging().double()
    average.load_state_dict(
        {n.removeprefix("ema."): t for n, t in engine.state() if n.startswith("ema.")}, strict=False
    )
    before = model_state(engine)
    with engine.evaluating():
        found = engine.predict(batch_of(6, 6))
    assert torch.allclose(found, average.eval()(batch_of(6, 6).images), rtol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_state(engine).items())


def test_gradients_do_not_carry_over_to_the_next_step(engine_of):
    engine = engine_of()
    norms = [stepped(engine, batches, lr=0.0) for batches in [[batch_of(9, 9)]] * 2]
    assert torch.equal(*norms)
    assert len(set(map(float, norms))) == 1
    assert float(norms[0]) > 0
    micro_batches = [in_shards(batch_of(9, 9), *bounds) for bounds in ((0, 4), (4, 9))]
    assert torch.equal(stepped(engine, micro_batches, lr=0.0), stepped(engine, micro_batches, lr=0.0))


def test_micro_batches_are_weighted_by_their_size(engine_of):
    engine, full_batch = engine_of(weight_decay=0.0), engine_of(weight_decay=0.0)
    batch = batch_of(9, 9)
    for used in (engine, full_batch):
        used.model.eval()  # in training, batch norm would see different batches
    stepped(engine, [in_shards(batch, 0, 2), in_shards(batch, 2)])
    stepped(full_batch, [batch])
    assert torch.allclose(weights(engine), weights(full_batch), rtol=1e-12, atol=1e-15)


def test_gradients_of_micro_batches_are_summed(engine_of):
    """In training mode, where batch norm sees one micro-batch at a time."""
    engine = engine_of(momentum=0.0, nesterov=False, weight_decay=0.0)
    batch, before = batch_of(9, 9), weights(engine)
    ends = [(0, 2), (2, 5), (5, 9)]
    micro_batches = [in_shards(batch, *bounds) for bounds in ends]
    expected = sum(
        gradient_of(plain_model(engine), micro_batch) * (stop - start) / 9
        for micro_batch, (start, stop) in zip(micro_batches, ends, strict=True)
    )
    stepped(engine, micro_batches, lr=1.0)
    assert torch.allclose(before - weights(engine), expected, rtol=1e-11, atol=1e-14)


def test_only_gradients_above_max_grad_norm_are_clipped(engine_of):
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    moves = {}
    for clip in (None, 1e-3, 1e3):
        engine = engine_of(**plain, max_grad_norm=clip)
        before = weights(engine)
        norm = stepped(engine, [batch_of(8, 8)], lr=1.0)
        moves[clip] = float((weights(engine) - before).norm())
        assert float(norm) == pytest.approx(moves[None], rel=1e-9)
    assert moves[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moves[1e3] == pytest.approx(moves[None], rel=1e-12)


def test_clipping_does_not_affect_the_next_step(engine_of):
    """`multiprocess/test_exact.py` checks that gradients in shared memory are not clipped in place."""
    engine = engine_of(max_grad_norm=1e-3)
    assert torch.equal(*[stepped(engine, [batch_of(9, 9)], lr=0.0) for _ in range(2)])


def test_loaded_state_continues_bit_identically(engine_of):
    first, second = engine_of(), engine_of()
    for seed in range(3):
        stepped(first, [batch_of(8, 8, seed)])
    second.load_state({name: tensor.clone() for name, tensor in first.state()})
    for engine in (first, second):
        stepped(engine, [batch_of(8, 8, 7)])
    assert {name for name, _ in second.state()} == {name for name, _ in first.state()}
    found = dict(second.state())
    assert all(torch.equal(found[name], tensor) for name, tensor in first.state())


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_fast_and_exact_mode_agree(max_grad_norm):
    one, other = fast(max_grad_norm=max_grad_norm), exact(max_grad_norm=max_grad_norm)
    for seed in range(4):
        batch = batch_of(11, 11, seed)
        micro_batches = [in_shards(batch, 0, 6), in_shards(batch, 6)]
        norms = [float(stepped(engine, micro_batches)) for engine in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    found = dict(other.state())
    assert found.keys() == dict(one.state()).keys()
    assert all(torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-14) for name, tensor in one.state())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_number_of_workers_is_bit_identical(precision):
    engines = [exact(precision, workers=workers) for workers in (1, 2, 3, 4)]
    dtype = torch.float64 if precision == "float64" else torch.float32
    for seed in range(3):
        norms = [stepped(engine, [batch_of(9, 9, seed, dtype)]) for engine in engines]
        assert len(set(map(float, norms))) == 1
    expected = dict(engines[0].state())
    for engine in engines[1:]:
        assert all(torch.equal(expected[name], tensor) for name, tensor in engine.state())


@pytest.mark.parametrize("threads", [1, 4])
def test_exact_mode_sets_torch_to_one_thread(threads):
    torch.set_num_threads(threads)
    engine = exact("float32", workers=1)
    assert torch.get_num_threads() == 1
    stepped(engine, [batch_of(9, 9, dtype=torch.float32)])


def test_loading_initial_state_resets_momentum(engine_of):
    fresh, used = engine_of(), engine_of()
    initial = {name: tensor.clone() for name, tensor in fresh.state()}
    stepped(used, [batch_of(8, 8)])
    used.load_state(initial)
    for engine in (fresh, used):
        stepped(engine, [batch_of(8, 8, 1)])
    assert torch.equal(weights(used), weights(fresh))


def test_state_has_canonical_names(engine_of):
    engine = engine_of()
    stepped(engine, [batch_of(8, 8)])
    model = Small()
    names = {f"model.{name}" for name in model.state_dict()}
    names |= {f"optimizer.{name}.momentum_buffer" for name, _ in model.named_parameters()}
    assert {name for name, _ in engine.state()} == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.out.bias"), r"model\.out\.bias \(10,\) is missing"),
        (
            lambda t: t.update({"model.out.bias": torch.zeros(3)}),
            r"model\.out\.bias has shape \(3,\), the model needs \(10,\)",
        ),
        (lambda t: t.update({"model.extra": torch.zeros(3)}), r"model\.extra is unknown"),
        (
            lambda t: t.update({"optimizer.extra.momentum_buffer": torch.zeros(3)}),
            r"optimizer\.extra.* is unknown",
        ),
    ],
)
def test_state_that_does_not_fit_is_rejected(engine_of, change, message):
    engine = engine_of()
    tensors = {name: tensor + 1 for name, tensor in engine.state()}
    change(tensors)
    before = weights(engine)
    with pytest.raises(ValueError, match=message):
        engine.load_state(tensors)
    assert torch.equal(weights(engine), before)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(precision, getattr(torch, precision if precision == "float64" else "float32")) for precision in PRECISIONS],
)
def test_dtypes_of_weights_and_forward_pass(engine_of, precision, dtype):
    engine = engine_of(precision)
    assert {tensor.dtype for name, tensor in model_state(engine).items() if "num_batches" not in name} == {dtype}
    of_forward = getattr(torch, precision)
    batch, seen = batch_of(6, 6, dtype=dtype), []

    def loss(model: nn.Module, shard: Batch) -> tuple[Tensor, Outcome]:
        logits = model(shard.images)
        seen.append(logits.dtype)
        return logits.float().sum(), Outcome(logits.detach()[:, 0], logits.detach())

    assert engine.micro_step(loss, batch, last=True).logits.dtype == of_forward
    engine.step(0.1, step=0)
    assert set(seen) == {of_forward}
    assert engine.predict(batch).dtype == of_forward
    assert {tensor.dtype for _, tensor in engine.state() if tensor.is_floating_point()} == {dtype}
    assert not torch.is_autocast_enabled("cpu")


def test_evaluation_that_raises_restores_training_mode(engine_of):
    engine = engine_of(ema_decay=0.5)
    stepped(engine, [batch_of(9, 9)])
    before = weights(engine)
    with pytest.raises(KeyError), engine.evaluating():
        raise KeyError
    assert all(module.training for module in engine.model.modules())
    assert torch.equal(weights(engine), before)


def test_failed_deepspeed_evaluation_waits_for_no_gather():
    class Stage3:
        def empty_partition_cache(self):
            raise RuntimeError("a gather that peers never joined")

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.stage, engine._ema, engine._deepspeed, engine.model = 3, None, Stage3(), Small()
    with pytest.raises(KeyError), engine.evaluating():
        raise KeyError
    assert engine.model.training


@pytest.mark.parametrize("count", [9, 3, 0])
def test_predictions_are_in_order_and_without_gradients(engine_of, count):
    engine = engine_of()
    stepped(engine, [batch_of(8, 8)])
    batch, before = batch_of(count, count, 5), {name: tensor.clone() for name, tensor in engine.state()}
    with engine.evaluating():
        logits = engine.predict(batch)
    assert not logits.requires_grad
    assert logits.shape == (count, 10)
    assert torch.allclose(logits, plain_model(engine).eval()(batch.images), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.state()), "evaluation changed the model"


def test_outcomes_are_in_the_order_of_the_images(engine_of):
    engine = engine_of()
    batch, model = batch_of(9, 9), plain_model(engine)

    def loss(model: nn.Module, shard: Batch) -> tuple[Tensor, Outcome]:
        logits = model(shard.images)
        return logits.sum(), Outcome(logits.detach()[:, 0] + shard.labels, logits.detach())

    losses, logits = engine.micro_step(loss, batch, last=True)
    expected = model(batch.images)
    assert torch.allclose(logits, expected, rtol=1e-11, atol=1e-13)
    assert torch.allclose(losses, expected[:, 0] + batch.labels, rtol=1e-11, atol=1e-13)
    assert not logits.requires_grad


class WithUnusedParameter(Small):
    """Has a parameter that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, 3))


def test_an_unused_parameter_has_a_gradient_of_zero():
    decay = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.1}
    for engine in (fast(model=WithUnusedParameter, **decay), exact(model=WithUnusedParameter, **decay)):
        stepped(engine, [batch_of(9, 9)], lr=1.0)
        decayed = torch.full((3, 3), 0.9, dtype=torch.float64)
        assert torch.allclose(model_state(engine)["unused"], decayed), "a parameter without a gradient would be skipped"


class FrozenStatistics(Small):
    """Keeps its batch norm in evaluation mode, as fine-tuning code does."""

    def train(self, mode: bool = True) -> "FrozenStatistics":
        super().train(mode)
        for module in self.modules():
            if type(module) is nn.BatchNorm2d:
                module.eval()
        return self


def test_frozen_statistics_stay_frozen_after_an_evaluation(engine_of: Callable[..., Engine]) -> None:
    """After the conversion no layer's type is nn.BatchNorm2d, so the network's own `train` would not find it."""
    engine = engine_of(model=lambda: FrozenStatistics().train())
    before = [module.training for module in engine.model.modules()]
    assert not all(before)
    with engine.evaluating():
        assert not any(module.training for module in engine.model.modules())
    assert [module.training for module in engine.model.modules()] == before


class HalfFrozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm.weight.requires_grad_(False)
        self.out.bias.requires_grad_(False)


def test_frozen_parameters_stay_and_others_are_trained():
    engines = [fast(model=HalfFrozen), exact(model=HalfFrozen)]
    initial = [model_state(engine) for engine in engines]
    for engine in engines:
        stepped(engine, [batch_of(9, 9)])
    found = [model_state(engine) for engine in engines]
    for name in ("norm.weight", "out.bias"):
        assert torch.equal(found[1][name], initial[1][name])
    assert not torch.equal(found[1]["conv.weight"], initial[1]["conv.weight"])
    for name, tensor in found[0].items():
        assert torch.allclose(found[1][name], tensor, rtol=1e-12, atol=1e-14), name


class UsesAWeightTwice(Small):
    """Uses its convolution before and after its batch norm."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(F.pad(images, (2, 2, 2, 2)))).relu()
        return self.out(self.conv(x[:, :3]).relu().mean((2, 3)))


class UsesANormTwice(Small):
    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.norm(self.norm(self.conv(images)).relu()).relu().mean((2, 3)))


class SkipsItsNorm(Small):
    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        return self.out((x + self.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("model", [UsesAWeightTwice, UsesANormTwice, SkipsItsNorm])
def test_layers_used_twice_and_skip_connections(model):
    engines = [fast(model=model), exact(model=model)]
    for engine in engines:
        stepped(engine, [batch_of(9, 9)])
    found, expected = (model_state(engine) for engine in reversed(engines))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-11, atol=1e-13), name


def test_tensors_of_five_dimensions_are_trained(engine_of):
    engine = engine_of(model=FiveDimensions)
    before = model_state(engine)["votes"]
    stepped(engine, [batch_of(9, 9)])
    assert not torch.equal(model_state(engine)["votes"], before)
    assert engine.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
