from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed.config.engines import Ddp
from distributed.config.sections import Loss, Sgd
from distributed.data.batch import Batch
from distributed.engine.ddp import DdpEngine
from distributed.engine.exact import ExactEngine
from distributed.engine.protocol import Engine, Outcome
from distributed.optim.optimizer import Optimizer
from distributed.training.steps import train_step
from distributed.training.totals import MetricAccumulator

CPU = torch.device("cpu")
SHARDS = 4
PRECISIONS = ["float32", "bfloat16", "float16", "float64"]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        return self.out(self.norm(self.conv(images)).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fast(precision: str = "float64", model: Callable[[], nn.Module] = Small, **optim: object) -> DdpEngine:
    torch.manual_seed(0)
    return DdpEngine(
        Ddp(), model(), optim=Sgd(**optim), precision=precision, channels_last=True, device=CPU, example=batch_of(2, 2),
        timeout_seconds=10, compile=False,
    )  # fmt: skip


def exact(
    precision: str = "float64", model: Callable[[], nn.Module] = Small, *, lanes: int = 2, **optim: object
) -> ExactEngine:
    torch.manual_seed(0)
    return ExactEngine(
        Ddp(), model(), optim=Sgd(**optim), precision=precision, channels_last=True, device=CPU, shards=SHARDS,
        lanes=lanes, timeout_seconds=10,
    )  # fmt: skip


@pytest.fixture(params=[fast, exact], ids=["fast", "exact"])
def engine_of(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    return request.param


def batch_of(count: int, global_count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (count,), generator=generator)
    keys = torch.zeros(count, 2, dtype=torch.int64)
    return cut_up(Batch(images.to(dtype), labels, torch.arange(count), keys, global_count, (count,)))


def cut_up(batch: Batch, start: int = 0, stop: int | None = None) -> Batch:
    """Images `start` to `stop` in shards of uneven size, some of them empty where there are few images."""
    part = slice(start, stop)
    count = len(batch.labels[part])
    cuts = [shard * count // SHARDS for shard in range(SHARDS + 1)]
    sizes = tuple(end - begin for begin, end in pairwise(cuts))
    tensors = (batch.images, batch.labels, batch.sample_ids, batch.sample_keys)
    return Batch(*[tensor[part] for tensor in tensors], batch.global_count, sizes)


def stepped(engine: Engine, batches: list[Batch], lr: float = 0.1) -> Tensor:
    return train_step(engine, batches, loss=Loss(), lr=lr, step=0, sums=MetricAccumulator(CPU))


def model_state(engine: Engine) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor.clone() for name, tensor in engine.state() if name.startswith("model.")}


def weights(engine: Engine) -> Tensor:
    state = model_state(engine)
    return torch.cat([state[name].flatten() for name, _ in Small().named_parameters()])


def plain_model(engine: Engine, model: nn.Module | None = None) -> nn.Module:
    """A model without any engine that has the engine's state."""
    plain = (model or Small()).double()
    plain.load_state_dict(model_state(engine))
    return plain


def gradient_of(model: nn.Module, batch: Batch) -> Tensor:
    F.cross_entropy(model(batch.images), batch.labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("count", [8, 9, 3, 1])
def test_a_step_is_that_of_the_mean_loss(engine_of, count):
    engine = engine_of(momentum=0.0, nesterov=False, weight_decay=0.0)
    batch, model, before = batch_of(count, count), plain_model(engine), weights(engine)
    gradient = gradient_of(model, batch)
    norm = stepped(engine, [batch], lr=0.3)
    assert torch.allclose(weights(engine), before - 0.3 * gradient, rtol=1e-12, atol=1e-15)
    assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-12)
    for name, buffer in model.named_buffers():
        assert torch.allclose(model_state(engine)[name], buffer, rtol=1e-12), name


def test_a_step_begins_with_no_gradient(engine_of):
    engine = engine_of()
    norms = [stepped(engine, batches, lr=0.0) for batches in [[batch_of(9, 9)]] * 2]
    assert torch.equal(*norms)
    assert len(set(map(float, norms))) == 1
    assert float(norms[0]) > 0
    parts = [cut_up(batch_of(9, 9), *part) for part in ((0, 4), (4, 9))]
    assert torch.equal(stepped(engine, parts, lr=0.0), stepped(engine, parts, lr=0.0))


def test_micro_batches_of_any_size_weigh_by_their_samples(engine_of):
    engine, whole = engine_of(weight_decay=0.0), engine_of(weight_decay=0.0)
    batch = batch_of(9, 9)
    for used in (engine, whole):
        used.model.eval()  # batch norm would see other batches
    stepped(engine, [cut_up(batch, 0, 2), cut_up(batch, 2)])
    stepped(whole, [batch])
    assert torch.allclose(weights(engine), weights(whole), rtol=1e-12, atol=1e-15)


def test_the_gradients_of_micro_batches_are_added_up(engine_of):
    """In training, where batch norm sees one of them at a time."""
    engine = engine_of(momentum=0.0, nesterov=False, weight_decay=0.0)
    batch, before = batch_of(9, 9), weights(engine)
    ends = [(0, 2), (2, 5), (5, 9)]
    parts = [cut_up(batch, *part) for part in ends]
    expected = sum(
        gradient_of(plain_model(engine), part) * (stop - start) / 9
        for part, (start, stop) in zip(parts, ends, strict=True)
    )
    stepped(engine, parts, lr=1.0)
    assert torch.allclose(before - weights(engine), expected, rtol=1e-11, atol=1e-14)


def test_a_large_gradient_is_scaled_down_to_the_asked_norm_and_a_small_one_stays(engine_of):
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


def test_a_gradient_that_was_scaled_down_does_not_weigh_in_the_next_step(engine_of):
    """That it is not scaled where all ranks read it takes several ranks to show: `test_exact.py`."""
    engine = engine_of(max_grad_norm=1e-3)
    assert torch.equal(*[stepped(engine, [batch_of(9, 9)], lr=0.0) for _ in range(2)])


def test_the_state_of_one_engine_continues_another_to_the_bit(engine_of):
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
def test_the_two_engines_compute_the_same(max_grad_norm):
    one, other = fast(max_grad_norm=max_grad_norm), exact(max_grad_norm=max_grad_norm)
    for seed in range(4):
        batch = batch_of(11, 11, seed)
        parts = [cut_up(batch, 0, 6), cut_up(batch, 6)]
        norms = [float(stepped(engine, parts)) for engine in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
    found = dict(other.state())
    assert found.keys() == dict(one.state()).keys()
    assert all(torch.allclose(found[name], tensor, rtol=1e-12, atol=1e-14) for name, tensor in one.state())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_number_of_lanes_does_not_touch_the_bits(precision):
    engines = [exact(precision, lanes=lanes) for lanes in (1, 2, 3, 4)]
    dtype = torch.float64 if precision == "float64" else torch.float32
    for seed in range(3):
        norms = [stepped(engine, [batch_of(9, 9, seed, dtype)]) for engine in engines]
        assert len(set(map(float, norms))) == 1
    expected = dict(engines[0].state())
    for engine in engines[1:]:
        assert all(torch.equal(expected[name], tensor) for name, tensor in engine.state())


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_of_torch_does_not_touch_the_bits(threads):
    """Whatever the process had before: an engine in exact mode sets it."""
    torch.set_num_threads(threads)
    engine = exact("float32", lanes=1)
    assert torch.get_num_threads() == 1
    stepped(engine, [batch_of(9, 9, dtype=torch.float32)])


def test_a_loaded_state_forgets_momentum_that_it_does_not_have(engine_of):
    fresh, used = engine_of(), engine_of()
    initial = {name: tensor.clone() for name, tensor in fresh.state()}
    stepped(used, [batch_of(8, 8)])
    used.load_state(initial)
    for engine in (fresh, used):
        stepped(engine, [batch_of(8, 8, 1)])
    assert torch.equal(weights(used), weights(fresh))


def test_names_are_canonical(engine_of):
    engine = engine_of()
    stepped(engine, [batch_of(8, 8)])
    model = Small()
    names = {f"model.{name}" for name in model.state_dict()}
    names |= {f"optimizer.{name}.momentum_buffer" for name, _ in model.named_parameters()}
    assert {name for name, _ in engine.state()} == names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.out.bias"), r"model\.out\.bias: here \(10,\), there nothing"),
        (lambda t: t.update({"model.out.bias": torch.zeros(3)}), r"model\.out\.bias: here \(10,\), there \(3,\)"),
        (lambda t: t.update({"model.extra": torch.zeros(3)}), r"model\.extra: not known here"),
        (
            lambda t: t.update({"optimizer.extra.momentum_buffer": torch.zeros(3)}),
            r"optimizer\.extra.*not known here",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(engine_of, change, said):
    engine = engine_of()
    tensors = {name: tensor + 1 for name, tensor in engine.state()}
    change(tensors)
    before = weights(engine)
    with pytest.raises(ValueError, match=said):
        engine.load_state(tensors)
    assert torch.equal(weights(engine), before)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(precision, getattr(torch, precision if precision == "float64" else "float32")) for precision in PRECISIONS],
)
def test_weights_have_the_type_of_the_precision(engine_of, precision, dtype):
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


@pytest.mark.parametrize("count", [9, 3, 0])
def test_predictions_are_in_the_order_of_the_images_and_have_no_gradients(engine_of, count):
    engine = engine_of()
    stepped(engine, [batch_of(8, 8)])
    batch, before = batch_of(count, count, 5), {name: tensor.clone() for name, tensor in engine.state()}
    with engine.evaluating():
        logits = engine.predict(batch)
    assert not logits.requires_grad
    assert logits.shape == (count, 10)
    assert torch.allclose(logits, plain_model(engine).eval()(batch.images), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.state()), "measuring changed the model"


def test_what_a_micro_step_tells_is_in_the_order_of_its_images(engine_of):
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


class WithIdle(Small):
    """One parameter that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))


def test_exact_mode_tells_of_a_parameter_that_got_no_gradient():
    with pytest.raises(RuntimeError, match="1 gradients did not come: exact mode needs every parameter"):
        stepped(exact(model=WithIdle), [batch_of(9, 9)])


class HalfFrozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm.weight.requires_grad_(False)
        self.out.bias.requires_grad_(False)


def test_a_parameter_that_does_not_learn_stays_and_the_others_move_as_they_would():
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
    """Before its batch norm and after it."""

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(F.pad(images, (2, 2, 2, 2)))).relu()
        return self.out(self.conv(x[:, :3]).relu().mean((2, 3)))


class UsesANormTwice(Small):
    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        return self.out(self.norm(self.norm(self.conv(images)).relu()).relu().mean((2, 3)))


class GoesAroundItsNorm(Small):
    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        x = self.conv(images)
        return self.out((x + self.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("model", [UsesAWeightTwice, UsesANormTwice, GoesAroundItsNorm])
def test_in_exact_mode_a_gradient_that_comes_in_several_parts_is_refused(model):
    engine = exact(model=model, momentum=0.0, nesterov=False, weight_decay=0.0)
    with pytest.raises(RuntimeError, match=r"exact mode: .* batch norm"):
        stepped(engine, [batch_of(9, 9)], lr=1.0)


@pytest.mark.parametrize(("everything", "decayed"), [(False, {"conv.weight", "out.weight"}), (True, None)])
def test_biases_and_norms_decay_only_if_asked(everything, decayed):
    model = Small()
    config = Sgd(weight_decay=0.5, decay_norm_and_bias=everything, momentum=0.0, nesterov=False)
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(config, list(model.parameters())).step(0.1)
    shrunk = {name for name, p in model.named_parameters() if torch.equal(p, torch.full_like(p, 2.0 * (1 - 0.1 * 0.5)))}
    kept = {name for name, p in model.named_parameters() if torch.equal(p, torch.full_like(p, 2.0))}
    names = {name for name, _ in model.named_parameters()}
    assert shrunk == (decayed or names)
    assert kept == names - shrunk


@pytest.mark.parametrize("momentum", [{"momentum": 0.0, "nesterov": False}, {"momentum": 0.9, "nesterov": False}, {}])
def test_the_optimizer_takes_the_steps_of_torchs(momentum):
    torch.manual_seed(0)
    models = [Small(), Small()]
    models[1].load_state_dict(models[0].state_dict())
    config = Sgd(weight_decay=0.01, decay_norm_and_bias=True, **momentum)
    own = Optimizer(config, list(models[0].parameters()))
    torchs = torch.optim.SGD(
        models[1].parameters(),
        lr=1.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=0.01,
        fused=True,
    )
    for lr in (0.1, 0.3, 0.05):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        own.step(lr)
        torchs.param_groups[0]["lr"] = lr
        torchs.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)
    own.zero_grad()
    assert all(p.grad is None for p in models[0].parameters())
